"""Runs on toy shards give the same curve for every shape, and a run that was interrupted ends like one that was not."""

import json
import os
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from mmscale.checkpoint import Checkpoint
from mmscale.config import validate
from mmscale.data.toy import make_toy
from mmscale.errors import UserError
from mmscale.train.folder import RunFolder

pytestmark = pytest.mark.slow

# What does not depend on the clock.
EXACT = ["step", "samples", "epoch", "loss", "loss_contrastive", "loss_caption", "logit_scale", "lr", "grad_norm"]
EXACT += ["skipped", "bad_samples"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """48 toy pairs in three shards, and a tokenizer trained on their captions."""
    from mmscale.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("toy")
    make_toy(folder / "data", samples=48, shards=3, val_samples=8)
    colours = ("red", "green", "blue", "yellow")
    captions = [f"a {c} {s} above two small squares" for c in colours for s in ("circle", "star", "cross")]
    train_tokenizer(captions, folder / "tokenizer.model", 290)
    return folder


def config(toy, run_dir, steps=8, save_every=None, **sections):
    raw = {
        "run": {"dir": str(run_dir), "save_every": save_every, "keep_last": 20},
        "data": {"train": str(toy / "data" / "train-*.tar"), "workers": 0},
        "tokenizer": {"path": str(toy / "tokenizer.model")},
        "model": {
            "embed_dim": 32,
            "vision": {"image_size": 32, "width": 32, "layers": 1, "pooler_queries": 5},
            "text": {"width": 32, "layers": 1},
            "decoder": {"layers": 1},
        },
        "optim": {"lr": 2e-3, "warmup_samples": 24},
        "train": {"samples": 8 * steps, "global_batch": 8, "zero_stage": 1},
        "log": {"every": 1},
    }
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return validate(raw)


def train_here(config, stop_at=None, stop_rank=0):
    """Trains in this process; with `stop_at`, this rank sends itself SIGTERM in that step."""
    from mmscale.train.trainer import train

    def interrupt(trainer, update):
        if trainer.step == stop_at and trainer.processes.rank == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    return train(config, hooks=[interrupt])


def metrics(config, keys=EXACT):
    return [{key: line[key] for key in keys} for line in lines(config, "metrics.jsonl")]


def lines(config, name):
    return [json.loads(line) for line in (Path(config.run.dir) / name).read_text().splitlines()]


def status(config):
    return json.loads((Path(config.run.dir) / "status.json").read_text())["status"]


def weights(config):
    checkpoint = Checkpoint.open(config.run.dir)
    return {
        f"{kind}/{name}": checkpoint.read(name, kind)
        for kind in checkpoint.manifest["tensors"]
        for name in checkpoint.names(kind)
    }


def assert_close_curves(ours, theirs):
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for key in ("loss", "loss_contrastive", "loss_caption"):
            assert our[key] == pytest.approx(their[key], abs=1e-4), (our["step"], key)


def test_ranks_and_loader_workers_do_not_change_the_curve(toy, tmp_path):
    runs = {}
    for ranks, workers in ((1, 0), (1, 1), (1, 3), (2, 0)):
        run = config(toy, tmp_path / f"{ranks}_{workers}", steps=30, data={"workers": workers})
        assert run_ranks(ranks, train_here, run) == [0] * ranks
        runs[ranks, workers] = metrics(run)
    assert len(runs[1, 0]) == 30
    assert runs[1, 1] == runs[1, 0] == runs[1, 3]
    assert_close_curves(runs[2, 0], runs[1, 0])


def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(toy, tmp_path):
    whole = config(toy, tmp_path / "whole", train={"zero_stage": 2})
    run_ranks(2, train_here, whole)
    parts = config(toy, tmp_path / "parts", save_every=16, train={"zero_stage": 2})
    # Rank 1 is told to stop at step 3, the other at step 6.
    assert run_ranks(2, train_here, parts, 2, 1) == [75, 75]
    assert status(parts) == "preempted"
    assert run_ranks(2, train_here, parts, 5, 0) == [75, 75]
    assert run_ranks(2, train_here, parts) == [0, 0]
    assert status(parts) == "finished"
    assert metrics(parts) == metrics(whole)
    ours, theirs = weights(parts), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_bad_sample_is_logged_once_across_epochs_and_resumes_and_the_worst_shard_is_named(toy, tmp_path):
    make_toy(tmp_path / "data", samples=48, shards=3, val_samples=2)
    bad_keys = set()
    for number, num_spoilt in ((0, 1), (1, 5)):
        shard = tmp_path / "data" / f"train-{number:05d}.tar"
        content = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            for member in [m for m in tar if m.name.endswith(".jpg")][:num_spoilt]:
                content[member.offset_data : member.offset_data + 4] = b"none"
                bad_keys.add((shard.stem, member.name.removesuffix(".jpg")))
        shard.write_bytes(content)
    shards = {"train": str(tmp_path / "data" / "train-*.tar")}
    run = config(toy, tmp_path / "run", steps=18, data=shards | {"max_bad_fraction": 1.0})
    assert [train_here(run, 8), train_here(run)] == [75, 0]  # cut within the second of three epochs
    logged = lines(run, "bad_samples.jsonl")
    assert sorted((line["shard"], line["key"]) for line in logged) == sorted(bad_keys)
    assert metrics(run, ["bad_samples"])[-1] == {"bad_samples": 3 * len(bad_keys)}
    strict = config(toy, tmp_path / "strict", steps=18, data=shards | {"max_bad_fraction": 0.01})
    with pytest.raises(UserError, match=r"max_bad_fraction: .* worst shard is train-00001 with \d+ of them"):
        train_here(strict)


def test_a_run_goes_on_with_other_ranks_stages_and_accumulation(toy, tmp_path):
    whole = config(toy, tmp_path / "whole", steps=10)
    run_ranks(1, train_here, whole)
    shapes = [
        (2, {"zero_stage": 1}),
        (1, {"zero_stage": 3}),
        (2, {"zero_stage": 3, "micro_batch": 2}),
        (1, {"zero_stage": 0}),
        (2, {"zero_stage": 1}),
    ]
    for index, (ranks, train) in enumerate(shapes):
        run = config(toy, tmp_path / "parts", steps=10, train=train)
        stop_at = 2 * index + 1 if index < len(shapes) - 1 else None
        run_ranks(ranks, train_here, run, stop_at, 0)
    assert_close_curves(metrics(run), metrics(whole))
    ours, theirs = weights(run), weights(whole)
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_lines_past_the_checkpoint_are_cut(toy, tmp_path):
    run = config(toy, tmp_path, steps=4, save_every=24)
    run_ranks(1, train_here, run)
    step_4 = tmp_path / "checkpoints" / "step_00000004" / "manifest.json"
    assert step_4.exists(), "the last step is saved, whatever save_every is"
    step_4.unlink()  # as if the run had been killed just before this commit
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "sam')
    run_ranks(1, train_here, run)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


def test_a_line_without_its_end_is_cut_too(tmp_path):
    # Killed between the object and the end of its line: the next line would be written behind it.
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "samples": 8}\n{"step": 2, "samples": 16}')
    RunFolder(tmp_path, writes=True).cut(16)
    assert file.read_text() == '{"step": 1, "samples": 8}\n'


def test_what_a_run_is_cannot_change(toy, tmp_path):
    first = config(toy, tmp_path / "run", steps=2)
    run_ranks(1, train_here, first)

    def refused(match, **sections):
        changed = config(toy, tmp_path / "run", steps=4, **sections)
        with pytest.raises(AssertionError, match=match):
            run_ranks(1, train_here, changed)
        assert status(first) == "refused"

    refused("run.seed: 0 in the checkpoint, 7 now", run={"seed": 7, "dir": str(tmp_path / "run")})
    refused(
        "model.text.layers: 1 in the checkpoint, 2 now",
        model=config(toy, "x").model.model_dump() | {"text": {"width": 32, "layers": 2}},
    )
    refused(
        "data.flip: False in the checkpoint, True now", data={"train": str(toy / "data" / "train-*.tar"), "flip": True}
    )
    refused("data.train: ", data={"train": str(toy / "data" / "train-00000.tar")})
    # What is only how the run is made may change, and is logged.
    allowed = config(toy, tmp_path / "run", steps=3, optim={"lr": 1e-3}, data={"workers": 1})
    run_ranks(1, train_here, allowed)
    changes = next(event["changes"] for event in reversed(lines(allowed, "events.jsonl")) if event["event"] == "resume")
    assert "optim.lr: 0.002 -> 0.001" in changes


@pytest.mark.parametrize(
    ("ranks", "train", "match"),
    [
        (
            2,
            {"global_batch": 9},
            "train.global_batch: 9 does not divide by 2 ranks; take 8 or 10, or a number of ranks among 1, 3, 9",
        ),
        (1, {"micro_batch": 3}, "train.micro_batch: 3 does not divide the 8 samples of a rank .* 1, 2, 4, 8 would"),
        (1, {"precision": "fp16"}, "fp16 does not run on a CPU"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(toy, tmp_path, ranks, train, match):
    with pytest.raises(AssertionError, match=match):
        run_ranks(ranks, train_here, config(toy, tmp_path, train=train))


def test_the_deepspeed_section_is_passed_through_but_cannot_contradict():
    from mmscale.train.engine import deepspeed_config

    base = {"run": {"dir": "x"}, "train": {"samples": 8, "global_batch": 8}}
    passed = validate(
        base | {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}}
    )
    settings = deepspeed_config(passed, 2, torch.device("cpu"))
    assert settings["zero_optimization"] == {"overlap_comm": False, "reduce_bucket_size": 1000, "stage": 1}
    assert settings["wall_clock_breakdown"] is True
    assert settings["train_micro_batch_size_per_gpu"] == 4
    clash = validate(base | {"deepspeed": {"zero_optimization": {"stage": 3}}})
    with pytest.raises(UserError, match=r"deepspeed.zero_optimization.stage: this follows from train.zero_stage"):
        deepspeed_config(clash, 2, torch.device("cpu"))
