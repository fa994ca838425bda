"""What the loop keeps over a restart, and what its lines say, on a task that trains in milliseconds."""

import contextlib
import io
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from tiny_task import TinyModel, build_tiny, tiny_config

from mmscale.checkpoint import Checkpoint
from mmscale.config import OptimConfig
from mmscale.errors import UserError
from mmscale.train.schedule import learning_rate
from mmscale.train.task import Evaluated
from mmscale.train.watchdog import Watchdog

pytestmark = pytest.mark.slow

STEPS, BATCH = 20, 8
NAN_AT, BAD_AT = 17, 9  # positions: the third step is skipped, the second holds a bad sample; odd ones are rank 1's
CLOCK = ("_s", "mem_gib", "data_wait_rank")  # ends of the names of what depends on the time or the machine


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def tensors(folder):
    checkpoint = Checkpoint.open(folder)
    kinds = checkpoint.manifest["tensors"]
    return {(kind, name): checkpoint.read(name, kind) for kind in kinds for name in checkpoint.names(kind)}


def build(config, processes, change=lambda batch: None):
    """The tiny task, with its batches changed before they are trained on."""
    task = build_tiny(config, processes)
    plain = task.stream.batches

    def batches(samples):
        for micro_batches in plain(samples):
            for batch in micro_batches:
                change(batch)
            yield micro_batches

    task.stream.batches = batches
    return task


def spoil(batch):
    batch.x[batch.positions == NAN_AT] = float("nan")
    if BAD_AT in batch.positions:
        batch.bad = [SimpleNamespace(position=BAD_AT, shard="a.tar", key="k", reason="broken")]


def train(config, hooks=(), change=spoil, evaluate=None):
    from mmscale.train.trainer import run

    def made(config, processes):
        task = build(config, processes, change)
        task.evaluate = evaluate
        return task

    return run(config, made, hooks=hooks)


def stop_after(*steps):
    def hook(trainer, update):
        if trainer.step in steps and trainer.processes.is_main:
            os.kill(os.getpid(), signal.SIGTERM)

    return hook


# --- restarts -----------------------------------------------------------------------------------------------------


def shape_config(folder, stage):
    return tiny_config(
        folder / str(stage),
        train={"zero_stage": stage, "ema_decay": 0.8},
        optim={"warmup_samples": 40},
        run={"dir": str(folder / str(stage)), "save_every": BATCH, "keep_last": 2 * STEPS},
    )


def train_whole_and_in_parts(root, stages):
    """Every stage twice: left alone, and stopped two times. Returns the seeds of all steps' randomness."""
    seeds = []
    for stage in stages:
        note = lambda trainer, update: seeds.append(torch.initial_seed())  # noqa: E731
        assert train(shape_config(root / "whole", stage), [note]) == 0
        parts = shape_config(root / "parts", stage)
        assert [train(parts, [stop_after(4)]), train(parts, [stop_after(11)]), train(parts)] == [75, 75, 0]
    return seeds[:STEPS]


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_every_shape_a_run_that_was_stopped_ends_bit_for_bit_like_one_left_alone(tmp_path, ranks):
    seeds = run_ranks(ranks, train_whole_and_in_parts, tmp_path, range(4))
    assert len({seed for of_rank in seeds for seed in of_rank}) == ranks * STEPS, "no step repeats another's noise"
    for stage in range(4):
        whole, parts = (tmp_path / name / str(stage) for name in ("whole", "parts"))
        ours, theirs = tensors(parts), tensors(whole)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), stage
        curves = [
            [{key: line[key] for key in line if not key.endswith(CLOCK)} for line in lines(run, "metrics.jsonl")]
            for run in (parts, whole)
        ]
        assert curves[0] == curves[1], stage
        assert [line["skipped"] for line in curves[0]] == [0, 0] + [1] * (STEPS - 2)
        assert [line["bad_samples"] for line in curves[0]] == [0] + [1] * (STEPS - 1)
        assert [line["key"] for line in lines(parts, "bad_samples.jsonl")] == ["k"]
        assert [event["step"] for event in lines(parts, "events.jsonl") if event["event"] == "resume"] == [5, 12]
        assert_averages(whole, 0.8)


def assert_averages(folder, decay):
    """The saved average of the weights is what their history, which was saved at every step, gives."""
    torch.manual_seed(0)
    average = {name: tensor.detach().clone() for name, tensor in TinyModel().named_parameters()}
    updates = 0
    for step in range(1, STEPS + 1):
        checkpoint = Checkpoint.open(folder / "checkpoints" / f"step_{step:08d}")
        updates += step != 3
        weight = 1 - min(decay, (1 + updates) / (10 + updates))
        for name, tensor in average.items():
            if step != 3:
                tensor.lerp_(checkpoint.read(name), weight)
            torch.testing.assert_close(checkpoint.read(name, "ema"), tensor, atol=1e-6, rtol=1e-5)


def begin_to_average(root, stages):
    found = []
    for stage in stages:
        config = tiny_config(root / str(stage), train={"zero_stage": stage})
        assert train(config, [stop_after(6)]) == 75
        config.train.ema_decay = 0.9
        config.train.samples = 8 * BATCH
        assert train(config) == 0
        before, after = (Checkpoint.open(root / str(stage) / "checkpoints" / f"step_{n:08d}") for n in (7, 8))
        found.append([(after.read(name, "ema"), before.read(name), after.read(name)) for name in before.names("param")])
    return found


def train_and_listen(folder):
    from mmscale.data import jpeg

    said = {}
    for available in (True, False):
        for decode in ("fast", "exact"):
            jpeg.AVAILABLE = available
            config = tiny_config(folder / f"{available}-{decode}", data={"decode": decode}, train={"samples": BATCH})
            with contextlib.redirect_stdout(io.StringIO()) as out:
                train(config)
            said[available, decode] = out.getvalue().count(jpeg.MISSING)
    return said


def test_a_missing_jpeg_decoder_is_told_once_where_it_would_be_used(tmp_path):
    said = run_ranks(1, train_and_listen, tmp_path)[0]
    assert said == {(True, "fast"): 0, (True, "exact"): 0, (False, "fast"): 1, (False, "exact"): 0}


def test_an_average_that_is_asked_for_later_begins_at_the_weights_of_then(tmp_path):
    for stage in run_ranks(1, begin_to_average, tmp_path, range(4))[0]:
        for average, before, after in stage:
            # The seventh update is the one that counts: the third was skipped.
            torch.testing.assert_close(average, torch.lerp(before, after, 1 - 8 / 17), atol=1e-6, rtol=1e-5)


def stop_and_go_on_damaged(folder):
    config = tiny_config(folder)
    assert train(config, [stop_after(9)]) == 75
    if os.environ["RANK"] == "0":
        file = folder / "checkpoints" / "step_00000010" / "rank_00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    torch.distributed.barrier()
    return train(config)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(tmp_path):
    assert run_ranks(2, stop_and_go_on_damaged, tmp_path) == [0, 0]
    events = lines(tmp_path, "events.jsonl")
    damaged = next(event for event in events if event["event"] == "damaged_checkpoint")
    assert (damaged["folder"], damaged["reason"]) == (
        "step_00000010",
        "rank_00001.safetensors: its checksum is wrong",
    )
    assert next(event["step"] for event in events if event["event"] == "resume") == 8
    assert [line["step"] for line in lines(tmp_path, "metrics.jsonl")] == list(range(1, STEPS + 1))


# --- saving -------------------------------------------------------------------------------------------------------


def save_slowly(root, stages):
    """Writing takes a second. Returns whether step 4 was committed at steps 5 and 9, and what was saved of it."""
    from mmscale.train import saving

    plain, found = saving.write_fragments, {}

    def slow(*args):
        time.sleep(1.0)
        plain(*args)

    saving.write_fragments = slow
    for stage in stages:
        seen, manifest = [], root / str(stage) / "checkpoints" / "step_00000004" / "manifest.json"

        def look(trainer, update, seen=seen, manifest=manifest):
            if trainer.step == 4:
                seen.append({(f.kind, f.name): f.data.clone() for f in trainer.engine.state.fragments()})
            if trainer.step in (5, 9):
                seen.append(manifest.exists())

        assert train(tiny_config(root / str(stage), train={"zero_stage": stage, "samples": 80}), [look]) == 0
        then, *committed = seen
        saved = tensors(manifest.parent)
        equal = all(torch.equal(saved[key].view(-1), then[key].view(-1)) for key in then)
        found[stage] = (committed, equal, saved.keys() == then.keys())
    return found


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path):
    found = run_ranks(1, save_slowly, tmp_path, (0, 1, 3))[0]
    assert found == {stage: ([False, True], True, True) for stage in (0, 1, 3)}


# --- numbers ------------------------------------------------------------------------------------------------------


def train_with_a_slow_rank_and_evaluations(folder):
    """Rank 1 waits for its data; evaluations take long. Returns what `describe` was given and the limits of hangs."""
    from mmscale.train import trainer as module

    shown, limits, rates = [], [], []
    plain = module.describe

    def describe(record, last_step, eta_s):
        shown.append((record["step"], record["samples_per_s"], last_step, eta_s))
        return plain(record, last_step, eta_s)

    module.describe = describe
    current = []

    def note(trainer, update):
        current[:] = [trainer]
        rates.append([group["lr"] for group in trainer.engine.deepspeed.optimizer.param_groups])

    def evaluate():
        limits.append(current[0].watchdog._limit)
        time.sleep(0.5)
        return Evaluated({"num_samples": 1})

    def wait(batch):
        if os.environ["RANK"] == "1":
            time.sleep(0.05)

    sections = {"eval": {"every": 40}, "optim": {"warmup_samples": 40}}
    assert train(tiny_config(folder, **sections), [note, stop_after(10)], wait, evaluate) == 75
    assert train(tiny_config(folder, **sections), [note], wait, evaluate) == 0
    return shown, limits, rates


def test_the_lines_are_right_from_the_first_step_on_and_after_a_resume(tmp_path):
    shown, limits, rates = run_ranks(2, train_with_a_slow_rank_and_evaluations, tmp_path)[0]
    assert [(step, last) for step, _, last, _ in shown] == [(step, STEPS) for step in range(1, STEPS + 1)]
    for step, samples_per_s, _, eta in shown:
        assert eta == pytest.approx((STEPS - step) * BATCH / samples_per_s)
    assert limits == [10 * 600.0] * 4, "an evaluation may take longer than a step"
    written = lines(tmp_path, "metrics.jsonl")
    optim = OptimConfig(lr=0.01, warmup_samples=40)
    expected = [learning_rate(optim, step * BATCH, BATCH, STEPS * BATCH) for step in range(STEPS)]
    assert [line["lr"] for line in written] == expected
    assert rates == [[rate] * len(rates[0]) for rate in expected], "what the optimizer was given"
    for line in written:
        assert line["data_wait_rank"] == 1
        # An evaluation's half second is no waiting for data. The wait is rank 1's and `step_s` rank 0's, which may be
        # busy with something else meanwhile: of these two neither has to be the longer one.
        assert 0.05 <= line["data_wait_s"] < 0.5
        assert line["samples_per_s"] == pytest.approx(BATCH / line["step_s"])
        # Evaluations come after the steps 5, 10, 15; their time is in the next line, and in no step's. Step 11 was the
        # last before the stop, and the first line after a resume knows nothing of what came before.
        assert ("evaluation_s" in line) == (line["step"] in (6, 11, 16))
        assert line["step_s"] < 0.5
        assert ("save_stall_s" in line) == (line["step"] in (5, 6, 9, 11, 13, 16, 17))
    assert all(line["evaluation_s"] >= 0.5 for line in written if "evaluation_s" in line)


def train_on_bad_samples(folder):
    def spoil_two(batch):
        batch.bad = [
            SimpleNamespace(position=int(p), shard="a.tar", key=f"k{p}", reason="broken")
            for p in batch.positions
            if p in (9, 25)
        ]

    return train(tiny_config(folder, data={"max_bad_fraction": 0.001}), change=spoil_two)


def test_too_many_bad_samples_end_the_run(tmp_path):
    with pytest.raises(AssertionError, match=r"data.max_bad_fraction: 2 of the first 32 samples .* a.tar/k25: broken"):
        run_ranks(2, train_on_bad_samples, tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "stopped"
    assert [line["key"] for line in lines(tmp_path, "bad_samples.jsonl")] == ["k9", "k25"]


def refuse_on_rank_1(folder):
    from mmscale.train.trainer import run

    def build(config, processes):
        if processes.rank == 1:
            raise UserError("data.train: this machine does not have it")
        return build_tiny(config, processes)

    return run(tiny_config(folder), build)


def test_what_one_rank_refuses_ends_all(tmp_path):
    with pytest.raises(AssertionError, match=r"rank 0:(.|\n)*UserError: data.train: this machine does not have it"):
        run_ranks(2, refuse_on_rank_1, tmp_path, timeout_s=40)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "refused"


# --- the watchdog's patience ----------------------------------------------------------------------------------------


def test_the_watchdog_is_patient_at_first_and_where_it_was_asked_to_be(tmp_path, monkeypatch):
    fired = []
    monkeypatch.setattr(Watchdog, "_end_it", lambda self: fired.append(time.monotonic()))
    alone = SimpleNamespace(rank=0, host="here", gather=lambda value: [value])
    with Watchdog(tmp_path, alone, 0.4, lambda reason: None) as watchdog:
        time.sleep(0.9)
        with watchdog.patience():
            time.sleep(0.9)
        assert not fired
        begin = time.monotonic()
        watchdog.beat()
        while not fired and time.monotonic() < begin + 20:
            time.sleep(0.01)
    assert fired and fired[0] - begin >= 0.4
