"""How long a run takes to be under way again, at sample 0 and at sample 5 billion.

    python -m benchmarks.resume [--quick] [--output FILE.json]

Position is one integer, so going on at sample 5,000,000,000 has to cost what starting at 0 costs. Timed: the stream
alone (names, sidecar indexes, the first global batch, decoded); and a whole process of training, from
its start to the end of its first step, with no checkpoint and with one that was saved at sample 5 billion.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Report, paired, parser, ratios
from benchmarks.scaling import toy_job
from mmscale.config import DataConfig, validate
from mmscale.data.loader import TrainStream
from mmscale.data.tokenizer import Tokenizer

BATCH = 256
FAR = 5_000_000_000 // BATCH * BATCH


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--one-step", metavar="JOB", help=argparse.SUPPRESS)
    options.add_argument("--save-at", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.one_step:
        one_step(json.loads(args.one_step), args.save_at)
        return
    report = Report("resume")
    with tempfile.TemporaryDirectory() as scratch:
        job = toy_job(Path(scratch), batch=BATCH)
        measure_stream(report, job, rounds=10 if args.quick else 50)
        measure_processes(report, job, Path(scratch), rounds=2 if args.quick else 10)
    report.finish(args.output)


def measure_stream(report: Report, job: dict, rounds: int) -> None:
    tokenizer = Tokenizer.load(job["tokenizer"]["path"])
    data = DataConfig(train=job["data"]["train"], workers=0)
    shape = {"image_size": 64, "context_length": 32, "seed": 0, "rank": 0, "world_size": 1}

    def first_batch(samples: int) -> None:
        stream = TrainStream(data, tokenizer, global_batch=BATCH, micro_batch=BATCH, **shape)
        next(iter(stream.batches(samples)))
        stream.close()

    times = paired({"sample 0": lambda: first_batch(0), f"sample {FAR:,}": lambda: first_batch(FAR)}, rounds)
    for name, readings in times.items():
        report.add(f"stream to first batch, at {name}", "s", readings, batch=BATCH)
    start, later = times.values()
    report.add("stream, far / start", "ratio", ratios(later, start))


def measure_processes(report: Report, job: dict, folder: Path, rounds: int) -> None:
    """Each reading is a process of its own, imports and all."""

    def run(name: str, save_at: int | None = None) -> None:
        job["run"]["dir"] = str(folder / name)
        saving = ["--save-at", str(save_at)] if save_at else []
        command = [sys.executable, "-m", "benchmarks.resume", "--one-step", json.dumps(job), *saving]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    job["train"]["samples"] = 10 * FAR
    run("far", save_at=FAR)
    # A step at the start writes no checkpoint, so that the folder stays one in which nothing was trained.
    times = paired({"start, at sample 0": lambda: run("start"), f"resume, at {FAR:,}": lambda: run("far")}, rounds, 1)
    for name, readings in times.items():
        report.add(f"process to first step, {name}", "s", readings, batch=BATCH)
    start, later = times.values()
    report.add("process, far / start", "ratio", ratios(later, start))


def one_step(job: dict, save_at: int | None) -> None:
    """Trains for one step and leaves at once; with `save_at`, after a checkpoint that says so many samples."""
    from mmscale.train.trainer import train

    def leave(trainer: Any, update: Any) -> None:
        if save_at:
            trainer.samples = save_at
            trainer.save()
            assert trainer.saver.flush().error is None
        os._exit(0)

    train(validate(job), hooks=[leave])


if __name__ == "__main__":
    main()
