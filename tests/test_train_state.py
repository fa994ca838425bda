"""Any ZeRO stage on any number of ranks saves the same tensors, and resumes from what any other has saved."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn

from mmscale.checkpoint import Checkpoint, commit, folder_name, write_fragments
from mmscale.config import validate
from mmscale.errors import UserError

GLOBAL_BATCH, LAYER_DECAY = 8, 0.8
# Nothing stays gathered in stage 3, as in a model that is large enough to need it.
STAGE_3 = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}


class Part(nn.Module):
    """Sizes that no number of ranks divides, vectors that do not decay, a buffer that is state and one that is not."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7)])
        self.norm = nn.LayerNorm(7)
        self.frozen = nn.Linear(7, 3)
        self.down = nn.Linear(7, 1)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x):
        self.seen += 1
        hidden = torch.tanh(self.norm(self.blocks[0](x)))
        for block in self.blocks[1:]:
            hidden = hidden + torch.tanh(block(hidden))
        return self.down(hidden) + self.frozen(hidden).sum(-1, keepdim=True)


class Objective(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Part()

    def forward(self, x):
        return (self.model(x) ** 2).sum()


def forward_backward(module, micro_batches, backward):
    world_size = torch.distributed.get_world_size()
    total = torch.zeros(())
    for x in micro_batches:
        loss = module(x) / GLOBAL_BATCH
        backward(loss * world_size)
        total += loss.detach()
    torch.distributed.all_reduce(total)
    return {"loss": total}


def build(stage, optimizer="adamw", seed=0):
    from mmscale.train.engine import Engine, start_processes
    from mmscale.train.optimizer import freeze

    processes = start_processes()
    torch.manual_seed(seed)
    objective = Objective()
    freeze(objective.model, ["frozen"])
    config = validate(
        {
            "run": {"dir": "unused"},
            "optim": {"weight_decay": 0.3, "name": optimizer, "layer_decay": LAYER_DECAY},
            "train": {
                "samples": 1,
                "global_batch": GLOBAL_BATCH,
                "zero_stage": stage,
                "grad_clip": 0.5,
                "ema_decay": 0.9,
            },
            "deepspeed": STAGE_3 if stage == 3 else {},
        }
    )
    return Engine(objective, forward_backward, config, processes), processes


def train(engine, processes, steps):
    curve = []
    for step in steps:
        x = torch.randn(GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(step))
        mine = x[processes.rank :: processes.world_size]
        update = engine.step([mine], lr=0.01)
        assert update.applied
        engine.average.update(step + 1)
        curve.append((float(update.values["loss"]), float(update.grad_norm)))
    return curve


def save(engine, processes, root, step):
    facts = {"step": step, "samples": 0, "config": {}, "loss_scale": engine.state.loss_scale()}
    folder = Path(root) / folder_name(step)
    write_fragments(folder, processes.rank, engine.state.fragments(), "once")
    if processes.is_main:
        commit(folder, processes.world_size, "once", facts)
    torch.distributed.barrier()
    return folder


def tensors_of(folder):
    checkpoint = Checkpoint.open(folder)
    return {
        f"{kind}/{name}": checkpoint.read(name, kind)
        for kind in checkpoint.manifest["tensors"]
        for name in checkpoint.names(kind)
    }


def write_and_go_on(root, stages, optimizer="adamw"):
    """Five updates, a save, and the two updates that come after it; for every stage."""
    results = {}
    for stage in stages:
        engine, processes = build(stage, optimizer)
        train(engine, processes, range(5))
        folder = save(engine, processes, Path(root) / f"{processes.world_size}_{stage}", 5)
        after = train(engine, processes, range(5, 7))
        weights = tensors_of(save(engine, processes, Path(root) / f"{processes.world_size}_{stage}_after", 7))
        results[stage] = (str(folder), after, weights)
    return results


def read_and_go_on(root, folders, stages, optimizer="adamw"):
    """Restores every folder in every stage, saves what was restored, and makes the two updates."""
    results = {}
    for stage in stages:
        for index, folder in enumerate(folders):
            engine, processes = build(stage, optimizer, seed=1)  # so that nothing is right by itself
            engine.state.restore(Checkpoint.open(folder))
            here = Path(root) / f"read_{processes.world_size}_{stage}_{index}"
            restored = tensors_of(save(engine, processes, here, 5))
            after = train(engine, processes, range(5, 7))
            weights = tensors_of(save(engine, processes, here, 7))
            results[stage, folder] = (restored, after, weights)
    return results


def assert_same(ours, theirs, exact=False):
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        if exact:
            assert torch.equal(tensor, theirs[key]), key
        else:
            torch.testing.assert_close(
                tensor, theirs[key], atol=5e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.slow
def test_every_stage_and_rank_count_saves_the_same_and_resumes_from_every_other(tmp_path):
    stages = (0, 1, 2, 3)
    written = {ranks: run_ranks(ranks, write_and_go_on, tmp_path, stages)[0] for ranks in (1, 2, 4)}
    origin, after, weights = written[2][1]
    reference = tensors_of(origin)
    assert {key.split("/")[0] for key in reference} == {"param", "exp_avg", "exp_avg_sq", "ema", "step", "buffer"}
    assert reference["step/blocks.0.weight"].item() == 5
    assert "buffer/table" not in reference
    everything = [folder for results in written.values() for folder, _, _ in results.values()]
    for results in written.values():
        for folder, their_after, their_weights in results.values():
            assert_same(tensors_of(folder), reference)
            torch.testing.assert_close(their_after, after, atol=1e-6, rtol=0)
            assert_same(their_weights, weights)
    # One writer into twelve readers, and twelve writers into one reader.
    runs = [(ranks, [origin], stages) for ranks in (1, 2, 4)] + [(2, everything, (3,))]
    for ranks, folders, readers in runs:
        for (stage, folder), (restored, their_after, their_weights) in run_ranks(
            ranks, read_and_go_on, tmp_path / f"from_{len(folders)}", folders, readers
        )[0].items():
            assert_same(restored, tensors_of(folder), exact=True)
            torch.testing.assert_close(their_after, after, atol=1e-6, rtol=0, msg=f"{ranks} ranks, stage {stage}")
            assert_same(their_weights, weights)
            assert their_weights["step/down.bias"].item() == 7


@pytest.mark.slow
def test_muons_momentum_moves_between_stages_and_ranks(tmp_path):
    stages = (0, 1, 2, 3)
    written = {ranks: run_ranks(ranks, write_and_go_on, tmp_path, stages, "muon")[0] for ranks in (1, 2)}
    origin, after, weights = written[2][1]
    reference = tensors_of(origin)
    momenta = {key for key in reference if key.startswith("momentum_buffer/")}
    assert momenta == {f"momentum_buffer/blocks.{i}.weight" for i in range(3)}
    assert "exp_avg/blocks.0.weight" not in reference and "exp_avg/down.weight" in reference
    for ranks in (1, 4):
        results = run_ranks(ranks, read_and_go_on, tmp_path / "read", [origin], stages, "muon")[0]
        for (stage, _), (restored, their_after, their_weights) in results.items():
            assert_same(restored, reference, exact=True)
            losses, expected = ([loss for loss, _ in curve] for curve in (their_after, after))
            torch.testing.assert_close(losses, expected, atol=1e-3, rtol=1e-3, msg=f"{ranks} ranks, stage {stage}")
            for key in momenta:
                torch.testing.assert_close(their_weights[key], weights[key], atol=1e-3, rtol=1e-2)


def rates_and_refusals(root, stages):
    """The rates that each stage steps with, and what it says to a checkpoint of another model."""
    found = []
    for stage in stages:
        engine, processes = build(stage)
        train(engine, processes, range(1))
        folder = save(engine, processes, Path(root) / str(stage), 1)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["tensors"]["param"]["down.weight"]["shape"] = [7, 1]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError) as refusal:
            engine.state.restore(Checkpoint.open(folder))
        found.append((sorted({group["lr"] for group in engine.deepspeed.optimizer.param_groups}), str(refusal.value)))
    return found


@pytest.mark.slow
def test_every_stage_steps_lower_blocks_with_lower_rates_and_refuses_another_models_weights(tmp_path):
    for rates, refusal in run_ranks(1, rates_and_refusals, tmp_path, (0, 1, 2, 3))[0]:
        # Three blocks below the output, and what is in none.
        assert rates == pytest.approx(sorted(0.01 * LAYER_DECAY**depth for depth in range(4)))
        assert "`down.weight` has the shape [7, 1] there, [1, 7] in this model" in refusal


def scale_and_restore(root, stages):
    found = []
    for stage in stages:
        engine, processes = build(stage)
        engine.deepspeed.optimizer.loss_scaler.cur_scale = 4096.0
        folder = save(engine, processes, Path(root) / str(stage), 1)
        again, _ = build(stage)
        again.state.restore(Checkpoint.open(folder))
        found.append(again.deepspeed.optimizer.loss_scaler.cur_scale)
    return found


@pytest.mark.slow
def test_the_loss_scale_is_restored(tmp_path):
    assert run_ranks(1, scale_and_restore, tmp_path, (1, 2, 3)) == [[4096.0] * 3]
