"""How training scales on this machine: weak and strong, in each ZeRO stage, with the loader and without.

    python -m benchmarks.scaling [--quick] [--processes 1,2] [--config configs/toy.yaml] [--output FILE.json]

All set-ups are alive at once and take turns of a few steps, each process with one thread (or one GPU).
Weak: the same batch per process. Strong: the same global batch. Efficiency: throughput per process against one process.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.common import ROOT, Report, parser
from benchmarks.fleet import Fleet
from mmscale.data.samples import iter_captions
from mmscale.data.tokenizer import train_tokenizer
from mmscale.data.toy import make_toy

TURN = 5  # steps; the first of a turn is dropped, since it warms caches that the others have cooled


def toy_job(folder: Path, batch: int, config: Path = ROOT / "configs/toy.yaml", **train) -> dict:
    """A configuration that trains on toy shards in `folder`, which are made when they are not there."""
    from mmscale.config import DataConfig

    if not (folder / "data").exists():
        make_toy(folder / "data", samples=2048, shards=4, val_samples=16)
        train_tokenizer(iter_captions(f"{folder}/data/train-*.tar", DataConfig()), folder / "tokenizer.model", 320)
    job = yaml.safe_load(config.read_text())
    job["run"]["dir"] = str(folder / "run")
    job["data"] |= {"train": f"{folder}/data/train-*.tar", "val": None}
    job["tokenizer"] = {"path": str(folder / "tokenizer.model")}
    job["train"] |= {"global_batch": batch, "samples": 10**9, "micro_batch": None, **train}
    job["eval"] = {}
    return job


def take_turns(fleets: dict[str, Fleet], rounds: int) -> dict[str, list[float]]:
    """Seconds a step, one reading a turn (its median), by fleet; the n-th readings belong together."""
    readings: dict[str, list[float]] = {name: [] for name in fleets}
    for _ in range(rounds):
        for name, fleet in fleets.items():
            readings[name].append(float(np.median(fleet.steps(TURN)[1:])))
    return readings


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--processes", help="comma-separated numbers of processes (default: 1 and all of this machine)"
    )
    options.add_argument("--config", type=Path, default=ROOT / "configs/toy.yaml")
    options.add_argument("--batch", type=int, default=32, help="samples of each process (weak), of all (strong)")
    options.add_argument("--rounds", type=int, help="turns of each set-up (default: 50, quick: 8)")
    args = options.parse_args()
    most = torch.cuda.device_count() or 2
    worlds = [int(n) for n in args.processes.split(",")] if args.processes else sorted({1, most})
    assert worlds[0] == 1, "efficiency is against one process"
    rounds = args.rounds or (8 if args.quick else 50)
    report = Report("scaling")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def compare(cases: dict[str, tuple[int, bool, dict]]) -> dict[str, list[float]]:
            with ExitStack() as stack:
                fleets = {
                    name: stack.enter_context(Fleet(settings, world, synthetic))
                    for name, (world, synthetic, settings) in cases.items()
                }
                return take_turns(fleets, rounds)

        def job(world: int, kind: str = "weak", stage: int = 1) -> dict:
            batch = args.batch * (world if kind == "weak" else 1)
            return toy_job(folder, batch, args.config, zero_stage=stage)

        for kind in ("weak", "strong"):
            times = compare({str(world): (world, True, job(world, kind)) for world in worlds})
            for world in worlds:
                batch = args.batch * (world if kind == "weak" else 1)
                rate = [batch / seconds for seconds in times[str(world)]]
                report.add(f"{kind}, throughput", "samples/s", rate, "higher", processes=world, zero=1)
                if world > 1:
                    gain = 1 if kind == "weak" else 1 / world
                    efficiency = [gain * a / b for a, b in zip(times["1"], times[str(world)], strict=True)]
                    report.add(f"{kind}, efficiency", "ratio", efficiency, "higher", processes=world, zero=1)
        world = worlds[-1]
        times = compare({"synthetic": (world, True, job(world)), "loader": (world, False, job(world))})
        share = [a / b for a, b in zip(times["loader"], times["synthetic"], strict=True)]
        report.add("loader-fed against synthetic, step time", "ratio", share, processes=world, zero=1)
        if not args.quick:
            times = compare({str(stage): (world, True, job(world, stage=stage)) for stage in range(4)})
            for stage in range(4):
                rate = [args.batch * world / seconds for seconds in times[str(stage)]]
                report.add("ZeRO stages, throughput", "samples/s", rate, "higher", processes=world, zero=stage)
    report.finish(args.output)


if __name__ == "__main__":
    main()
