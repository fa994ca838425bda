"""The numbers of a run are right from the first line on, and nothing that takes them can stop training."""

import errno
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_task import build_tiny, tiny_config

from mmscale.config import LogConfig
from mmscale.train.folder import JsonLines, RunFolder
from mmscale.train.guards import Exchange
from mmscale.train.metrics import Meter, Sinks, describe, duration, number


def seen(wait=0.0, rank=0, tokens=10, padded=16):
    return Exchange(0, False, False, wait, rank, 0, tokens, padded)


def test_rates_are_per_second_of_training_and_pauses_are_kept_apart():
    meter = Meter()
    for wait, rank in ((0.01, 0), (0.02, 3), (0.0, 1), (0.01, 0)):
        time.sleep(0.025)
        meter.add(8, seen(wait, rank))
    with meter.pause("evaluation"):
        time.sleep(0.2)
    rates = meter.rates(flops_per_sample=1e6, peak_flops=1e9)
    assert 0.025 <= rates["step_s"] < 0.045
    assert rates["samples_per_s"] == pytest.approx(8 / rates["step_s"])
    assert rates["tokens_per_s"] == pytest.approx(10 / rates["step_s"])
    assert rates["padded_tokens_per_s"] == pytest.approx(16 / rates["step_s"])
    assert rates["mfu"] == pytest.approx(1e6 * rates["samples_per_s"] / 1e9)
    assert rates["data_wait_s"] == pytest.approx(0.01)
    assert rates["data_wait_rank"] == 3
    assert rates["evaluation_s"] == pytest.approx(0.2, rel=0.2)
    assert Meter().rates(None, None)["mfu"] is None


def test_what_json_does_not_know_becomes_null():
    assert [number(value) for value in (None, float("nan"), float("inf"), 2)] == [None, None, None, 2.0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5s"), (125, "2m05s"), (3600 * 3 + 7 * 60, "3h07m"), (100_800, "1d04h")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_the_line_for_people_reads_like_the_documented_one():
    record = {"step": 1200, "loss": 3.4119, "loss_contrastive": 1.204, "loss_caption": 2.208, "grad_norm": 0.834}
    record |= {"lr": 4e-4, "samples_per_s": 5120.3, "mfu": 0.4131, "mem_gib": 61.2, "step_s": 0.402}
    record |= {"data_wait_s": 0.00724, "data_wait_rank": 5, "skipped": 0, "bad_samples": 3}
    assert describe(record, 50_000, 100_800) == (
        "step 1200/50000 | loss 3.412 (con 1.204 cap 2.208) | gnorm 0.83 | lr 4.0e-04 | 5,120 img/s | mfu 41.3% | "
        "mem 61.2 GiB | step 402 ms | data 1.8% @r5 | skip 0 bad 3 | eta 1d04h"
    )


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path, capsys):
    # /dev/full is a disk that is always full; the lines are kept and come out in order once there is room.
    lines = JsonLines(tmp_path / "metrics.jsonl")
    real, lines._file = lines._file, FullDisk(lines._file)
    lines.append({"step": 1})
    lines.append({"step": 2})
    assert "2 lines wait in memory" in capsys.readouterr().err
    lines._file = real
    lines.append({"step": 3})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3]


class FullDisk:
    """Writes go to /dev/full, everything else to the real file."""

    def __init__(self, real):
        self._real = real
        self._full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115

    def write(self, content):
        return self._full.write(content)

    def __getattr__(self, name):
        return getattr(self._real, name)


def train_tiny(config, broken_wandb=False):
    from mmscale.train.trainer import run

    if broken_wandb:
        sys.modules["wandb"] = None  # importing it fails, as where it is not installed
    os.environ["WANDB_SILENT"] = "true"
    return run(config, build_tiny)


@pytest.mark.slow
def test_tensorboard_and_offline_wandb_get_the_lines_and_go_on_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = {"every": 1, "tensorboard": True, "wandb": "offline"}
    assert run_ranks(1, train_tiny, tiny_config(tmp_path, log=log, train={"samples": 80})) == [0]
    first = (tmp_path / "wandb_id").read_text()
    # As if the run had been killed before its last save: the steps 9 and 10 are made, and told, once more.
    (tmp_path / "checkpoints" / "step_00000010" / "manifest.json").unlink()
    assert run_ranks(1, train_tiny, tiny_config(tmp_path, log=log)) == [0]
    assert (tmp_path / "wandb_id").read_text() == first
    assert len([path for path in (tmp_path / "wandb").iterdir() if path.name.endswith(first)]) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))


def test_a_status_that_cannot_be_written_is_told_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def full_disk(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmscale.train.folder.write_whole", full_disk)
    RunFolder(tmp_path, writes=True).write_status("stopped", 8, 1, "too many bad samples")
    assert re.search("status.json: No space left.*'stopped'.*too many bad samples", capsys.readouterr().err)


def test_a_sink_that_fails_on_the_way_is_left_out_from_then_on(tmp_path, capsys):
    calls = []

    class Broken:
        def log(self, values, step):
            calls.append(step)
            raise ConnectionError("no route")

    folder = RunFolder(tmp_path, writes=True)
    sinks = Sinks(folder, LogConfig(), {}, 0)
    sinks._others["tracker"] = Broken()
    for step in (1, 2):
        sinks.line({"step": step, "samples": step, "loss": 1.0})
    folder.close()
    assert calls == [1]
    assert "tracker is off for the rest of this run: ConnectionError: no route" in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_sink_that_fails_does_not_stop_training(tmp_path):
    log = {"every": 1, "wandb": "online"}
    assert run_ranks(1, train_tiny, tiny_config(tmp_path, log=log), True) == [0]
    assert len(Path(tmp_path / "metrics.jsonl").read_text().splitlines()) == 20
