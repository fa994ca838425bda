"""What `mmscale plan` computes: against the model itself where that can be held, and against hand-made arithmetic."""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmscale import plan as planning
from mmscale.config import load_config, validate
from mmscale.data.loader import Batch
from mmscale.errors import UserError
from mmscale.hardware import EFFICIENCY, GPUS, bandwidth
from mmscale.model.presets import build_model
from mmscale.objectives.pretraining import PretrainingObjective
from mmscale.plan import Setup, largest_micro_batch, memory, plan, step_time, sweep
from mmscale.report import plan_tables

CONFIGS = Path(__file__).parents[1] / "configs"


def make(gpus=8, gpu="h100", text_tokens=None, net="400Gb", price=None, **sections):
    train = {"samples": 1_000_000, "global_batch": 1024} | sections.pop("train", {})
    config = validate({"run": {"dir": "x"}, "train": train, "model": {"preset": "b32"}} | sections)
    return plan(config, gpus, gpu, net, price, text_tokens=text_tokens)


def test_parameters_are_those_of_the_model():
    setup = make(model={"preset": "tiny"}).setup
    model = build_model(setup.model)
    assert sum(setup.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert setup.parameters["decoder"] == sum(parameter.numel() for parameter in model.decoder.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_the_backward_pass_keeps(precision):
    batch, length = 16, 24
    sizes = {"layers": 3, "width": 64, "heads": 2}
    model = {"preset": "tiny", "vision": sizes | {"pooler_queries": 9}, "text": sizes, "decoder": {"heads": 2}}
    setup = make(1, model=model, train={"precision": precision, "zero_stage": 0}, text_tokens=length).setup
    setup = replace(setup, model=type(setup.model)(**(setup.model.to_dict() | {"vocab_size": 256})))
    objective = PretrainingObjective(build_model(setup.model), setup.config.objective)
    parameters = {parameter.data_ptr() for parameter in objective.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    side = setup.model.vision_config.image_size
    sample = Batch(
        pixel_values=torch.randint(0, 255, (batch, 3, side, side), dtype=torch.uint8),
        input_ids=torch.randint(4, 256, (batch, length)),
        lengths=torch.full((batch,), length),
        valid=torch.ones(batch, dtype=torch.bool),
        positions=torch.arange(batch),
        keys=[""] * batch,
        bad=[],
    )
    inputs = {name: getattr(sample, name) for name in ("pixel_values", "input_ids", "lengths", "valid", "positions")}
    counts = {"num_valid": torch.tensor(batch), "num_tokens": torch.tensor(batch * length)}
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss = objective(**inputs, **counts)[0]
    measured = sum(storage.nbytes() for storage in kept.values()) / batch
    assert loss.requires_grad
    assert planning.saved_bytes(setup) == pytest.approx(measured, rel=0.12)


def test_stages_shard_one_kind_after_the_other():
    setup = make(gpus=8).setup
    total = sum(setup.parameters.values())
    stages = [memory(setup, 1, stage) for stage in range(4)]
    assert [item.weights for item in stages] == [4 * total, 4 * total, 4 * total, total / 2]
    assert [item.gradients for item in stages] == [4 * total, 4 * total, total / 2, total / 2]
    assert [item.optimizer for item in stages] == [8 * total, 1.5 * total, 1.5 * total, 1.5 * total]


def test_what_is_not_there_at_the_same_time_is_not_added_up():
    setup = make(gpus=8).setup
    total = sum(setup.parameters.values())
    bucket = 4 * 5e8

    def rest(micro_batch, stage, **options):
        setup = make(gpus=8, deepspeed={"zero_optimization": options}, train={"zero_stage": stage}).setup
        need = memory(setup, micro_batch)
        return need, need.total - need.weights - need.optimizer

    need, most = rest(128, 1)  # the activations are large: the gradients take their place as they go
    assert most == need.activations + need.logits + bucket
    assert rest(128, 1, overlap_comm=True)[1] == most + bucket
    assert rest(64, 1)[1] == need.activations / 2 + rest(64, 1)[0].logits + bucket + 4 * total  # accumulation
    need, most = rest(128, 0)
    assert most == need.activations + need.logits and need.buffers == 4 * total
    assert rest(128, 3)[0].buffers == bucket + 4 * total  # the weights it has gathered
    assert rest(128, 3, stage3_max_live_parameters=1e6)[0].buffers == bucket + 4e6
    small, most = rest(1, 0, reduce_bucket_size=1000)
    assert most == small.gradients + small.step


def test_a_cpu_keeps_what_is_freed_and_does_one_thing_after_the_other():
    cpu = replace(GPUS["h100"], is_host=True, slack=2.0, runtime=1e6)
    one, setup = (replace(make(1, train={"zero_stage": 2, "global_batch": n}).setup, gpu=cpu) for n in (1, 256))
    few, many = memory(one, 1), memory(setup, 256)
    assert few.buffers == few.gradients  # the rest of the bucket is never touched
    for found in (few, many):
        passing = 2 * (found.activations + found.logits) + 3 * found.gradients + found.step  # itself, bucket, flat copy
        assert found.total == 1e6 + found.weights + found.optimizer + passing
    step = step_time(setup, 256)
    assert step.seconds == pytest.approx(step.products + step.element_wise + step.optimizer + step.host)


def test_half_precision_parameters_take_half_but_need_a_master_copy():
    setup = make(gpus=1, train={"precision": "bf16_params"}).setup
    total = sum(setup.parameters.values())
    need = memory(setup, 1, stage=0)
    assert (need.weights, need.gradients, need.optimizer) == (2 * total, 2 * total, 12 * total)


def test_recomputing_saves_most_activations():
    setup = make().setup
    assert memory(setup, 64, checkpointing="full").activations < 0.35 * memory(setup, 64).activations
    every_2 = memory(setup, 64, checkpointing="every_2").activations
    assert memory(setup, 64, checkpointing="full").activations < every_2 < memory(setup, 64).activations


def test_largest_micro_batch_fits_and_the_next_does_not():
    setup = make(gpus=1, gpu="a100", train={"global_batch": 4096}).setup
    micro = largest_micro_batch(setup)
    limit = planning.USABLE * setup.gpu.memory
    assert 4096 % micro == 0 and micro < 4096
    assert memory(setup, micro).total <= limit < memory(setup, 2 * micro).total


def test_stage_3_communicates_half_as_much_again():
    def network(stage, **train):
        return step_time(make(gpus=64, train={"zero_stage": stage} | train).setup, 16).network

    # https://arxiv.org/abs/1910.02054, section 7: 2 P for stages 0-2, 3 P for stage 3.
    assert network(1) == pytest.approx(network(2))
    assert network(3) / network(2) == pytest.approx(1.5, rel=0.05)
    assert network(2, global_batch=2048) > 1.4 * network(1, global_batch=2048)  # accumulation 2


def test_more_work_takes_longer():
    def products(**sections):
        return step_time(make(**sections).setup, 128).products

    once = products()
    assert products(model={"preset": "b32", "checkpoint": "full"}) == pytest.approx(4 / 3 * once, rel=0.02)
    assert products(train={"global_batch": 2048}) > 2 * once  # and the pass that embeds everything first
    assert products(objective={"caption_weight": 0.0}) < once


def test_what_binds_is_named():
    assert make(gpus=1).step.binds == "compute"
    assert make(gpus=1024).step.binds == "network"
    small = make(gpus=1, gpu="b200", model={"preset": "tiny"})
    assert small.step.binds == "loader"
    launches = make(gpus=1, gpu="b200", train={"global_batch": 8})
    assert launches.step.binds == "kernel launches" and launches.step.seconds == launches.step.host
    assert small.samples_per_s == pytest.approx(planning.CORES_PER_GPU / planning.LOADER_CPU_S["exact"])


def test_price_and_days_follow_from_the_throughput():
    item = make(gpus=16)
    assert item.days == pytest.approx(1_000_000 / item.samples_per_s / 86_400)
    assert item.cost == pytest.approx(item.days * 24 * 16 * GPUS["h100"].price)
    assert 0 < item.mfu < EFFICIENCY


def test_sweep_scales_less_than_proportionally_and_is_drawn(tmp_path):
    plans = list(sweep(make()))
    assert [item.setup.gpus for item in plans] == [2**n for n in range(11)]  # 1024 samples: no more ranks than that
    each = [item.samples_per_s / item.setup.gpus for item in plans]
    assert all(later <= earlier * 1.0001 for earlier, later in itertools.pairwise(each))
    assert "1024" in plan_tables.sweep_table(plans)
    plan_tables.draw_sweep(plans, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["toy", "coca_b32", "coca_l14", "coca_g14"])
def test_every_config_can_be_planned(name):
    text = plan_tables.describe(plan(load_config(CONFIGS / f"{name}.yaml"), 8, "h200"))
    assert "samples/s" in text and text.count("stage ") in (8, 12) and text.count("\n*") == 1


@pytest.mark.parametrize(("text", "expected"), [("400Gb", 50e9), ("50GB", 50e9), ("3.2Tb", 400e9)])
def test_bandwidths(text, expected):
    assert bandwidth(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gpu": "h220"}, "did you mean h200"),
        ({"gpu": "abacus"}, "choose one of"),
        ({"gpus": 3}, "2 or 4 would"),
        ({"gpus": 0}, "from 1 on"),
        ({"gpus": -8}, "from 1 on"),
        ({"gpus": 5000}, "1024 would"),
        ({"net": "fast"}, "400Gb"),
        ({"net": "-400Gb"}, "400Gb"),
        ({"net": "nanGB"}, "400Gb"),
        ({"price": -1.0}, "GPU hour"),
        ({"text_tokens": 0}, "at least 2"),
    ],
)
def test_impossible_plans_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        make(**arguments)


def test_a_model_that_does_not_fit_is_refused_with_advice():
    with pytest.raises(UserError, match="zero_stage"):
        make(gpus=1, gpu="l40s", model={"preset": "g14", "vision": {"layers": 80}})
    too_much = make(gpus=8, gpu="l40s", model={"preset": "l14"}, train={"global_batch": 8192, "micro_batch": 1024})
    assert not too_much.fits and "does not fit" in plan_tables.describe(too_much)
    assert isinstance(make(gpus=64, model={"preset": "g14"}, train={"zero_stage": 3}).setup, Setup)
