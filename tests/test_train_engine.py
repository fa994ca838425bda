"""The same run in every precision, with offload, with evaluations in the loop: what the engine's options promise."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_train_resume import config, metrics, toy, train_here, weights  # noqa: F401

pytestmark = pytest.mark.slow


def train_many(configs):
    """Several runs, one after the other, in the same process group."""
    return [train_here(each) for each in configs]


def evaluations(run):
    return [json.loads(line) for line in (Path(run.run.dir) / "evaluations.jsonl").read_text().splitlines()]


def test_evaluations_in_the_loop_are_the_same_for_every_shape(toy, tmp_path):  # noqa: F811
    data = {"train": str(toy / "data" / "train-*.tar"), "val": str(toy / "data" / "val-*.tar"), "workers": 0}
    settings = {"every": 16, "batch": 3}
    one = config(toy, tmp_path / "one", steps=4, data=data, eval=settings, train={"zero_stage": 0})
    two = config(toy, tmp_path / "two", steps=4, data=data, eval=settings, train={"zero_stage": 3})
    assert run_ranks(1, train_here, one) == [0]
    assert run_ranks(2, train_here, two) == [0, 0]
    assert [line["step"] for line in evaluations(one)] == [2, 4]
    for ours, theirs in zip(evaluations(two), evaluations(one), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
        assert ours["num_samples"] == 8
    # Saved first: an evaluation can lose nothing.
    assert sorted(path.name for path in (tmp_path / "two" / "checkpoints").glob("step_*")) == [
        "step_00000002",
        "step_00000004",
    ]
    examples = [json.loads(line) for line in (tmp_path / "two" / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 16
    assert all(example["jpeg"] and example["references"] for example in examples)


def test_an_evaluation_whose_time_is_over_is_scored_on_what_it_has_seen(toy, tmp_path):  # noqa: F811
    data = {"train": str(toy / "data" / "train-*.tar"), "val": str(toy / "data" / "val-*.tar"), "workers": 0}
    run = config(toy, tmp_path, steps=2, data=data, eval={"every": 16, "batch": 1, "max_minutes": 1e-9})
    assert run_ranks(2, train_here, run) == [0, 0]
    # One batch of one sample on each of two ranks; generation took longer than the time allowed.
    assert [line["num_samples"] for line in evaluations(run)] == [2]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["num_samples"] for event in events if event["event"] == "evaluation_cut"] == [2]


def test_offloaded_state_trains_and_resumes_like_state_that_stays(toy, tmp_path):  # noqa: F811
    shapes = {"optimizer": {"zero_stage": 2, "offload": "optimizer"}, "all": {"zero_stage": 3, "offload": "all"}}
    # The run is longer in the second call: with a constant rate its first half does not depend on that.
    rates = {"lr": 2e-3, "schedule": "constant"}
    plain = config(toy, tmp_path / "plain", steps=4, optim=rates)
    first = [
        config(toy, tmp_path / name, steps=2, train=train | {"samples": 16}, optim=rates)
        for name, train in shapes.items()
    ]
    whole = [config(toy, tmp_path / name, steps=4, train=train, optim=rates) for name, train in shapes.items()]
    run_ranks(1, train_many, [plain, *first])
    run_ranks(2, train_many, whole)
    expected = weights(plain)
    for run in whole:
        for name, tensor in weights(run).items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("precision", ["bf16", "bf16_params"])
def test_half_precision_follows_the_fp32_curve_in_every_stage_and_resumes(toy, tmp_path, precision):  # noqa: F811
    reference = config(toy, tmp_path / "fp32", steps=6)
    run_ranks(1, train_here, reference)
    rates = [line["loss"] for line in metrics(reference)]
    shapes = [{"zero_stage": stage, "precision": precision} for stage in range(4)]
    runs = [config(toy, tmp_path / str(stage), steps=6, train=train) for stage, train in enumerate(shapes)]
    assert run_ranks(2, train_many, runs)[0] == [0, 0, 0, 0]
    for run in runs:
        assert [line["loss"] for line in metrics(run)] == pytest.approx(rates, rel=0.02)
        assert all(tensor.dtype == torch.float32 for name, tensor in weights(run).items() if name.startswith("param/"))
    # From the middle on, in another stage and on another number of ranks: the masters are what is resumed.
    moved = config(toy, tmp_path / "moved", steps=6, train=shapes[1], save_every=24)
    run_ranks(2, train_here, moved, 3, 0)
    run_ranks(1, train_here, config(toy, tmp_path / "moved", steps=6, train=shapes[3]))
    assert [line["loss"] for line in metrics(moved)] == pytest.approx(rates, rel=0.02)


def test_a_new_run_starts_from_the_weights_of_another_and_needs_them_only_once(toy, tmp_path):  # noqa: F811
    first = config(toy, tmp_path / "first", steps=3)
    run_ranks(1, train_here, first)
    model = first.model.model_dump() | {"init_from": first.run.dir}
    second = config(toy, tmp_path / "second", steps=1, model=model, optim={"lr": 1e-9})
    run_ranks(1, train_here, second)
    ours, theirs = weights(second), weights(first)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs if name.startswith("param/"))
    assert ours["step/logit_scale.log_scale"] == 1
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    assert run_ranks(1, train_here, config(toy, tmp_path / "second", steps=2, model=model)) == [0]


def test_a_check_runs_one_step_and_writes_nothing(toy, tmp_path):  # noqa: F811
    run = config(toy, tmp_path / "run")
    assert run_ranks(2, check_only, run) == [0, 0]
    assert not (tmp_path / "run").exists()


def check_only(run):
    from mmscale.train.trainer import train

    return train(run, check=True)


def train_more_than_fits(folder):
    from tiny_task import build_tiny, tiny_config

    from mmscale.train.trainer import run

    def build(config, processes):
        task = build_tiny(config, processes)

        def forward_backward(module, micro_batches, backward):
            return torch.empty(1 << 45)

        task.forward_backward = forward_backward
        return task

    return run(tiny_config(folder, train={"global_batch": 24, "micro_batch": 12}), build)


def test_running_out_of_memory_is_answered_with_a_smaller_micro_batch(tmp_path):
    with pytest.raises(
        AssertionError, match=r"UserError: train.micro_batch: 12 does not fit into memory; set it to 6 "
    ):
        run_ranks(1, train_more_than_fits, str(tmp_path))
