"""How training scales on this machine: weak and strong, in each ZeRO stage, with the loader and without, beside peers.

    python -m benchmarks.scaling [--quick] [--processes 1,2] [--models tiny,25M] [--output FILE.json]

All set-ups are alive at once and take turns of a few steps, each process with one thread on a core of its own (or with
one GPU); those that wait are stopped. Weak: the same batch per process. Strong: the same global batch. Efficiency:
throughput per process against one process. The machine's own ceiling is measured beside it: as many processes as cores,
each training alone, without a word between them. What they lose against one of them is memory bandwidth, cache and
clock, and no software's. `--accumulation` makes a step of several micro-batches, as a run with a large global batch
does: gradients and weights are exchanged once for all of them.

Models: `tiny` is that of configs/toy.yaml (2M parameters, pictures of 64 x 64); `25M` has 6 + 6 + 6 layers of width 384
and 256 on pictures of 224 x 224. Data: toy shards; synthetic means the first batches again and again.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.common import ROOT, Report, parser, ratios
from benchmarks.fleet import Fleet
from mmscale.config import DataConfig, validate
from mmscale.data.loader import TrainStream
from mmscale.data.samples import iter_captions
from mmscale.data.tokenizer import Tokenizer, train_tokenizer
from mmscale.data.toy import make_toy

PINNED = None if torch.cuda.is_available() else 0  # the first process's core
TURNS = {"tiny": 5, "25M": 3}  # steps; the first of a turn is dropped: it warms caches that the others have cooled
PARTS = ("weak", "peers", "strong", "loader", "stages")  # `peers` take part in `weak`
MODELS = {
    "tiny": {"preset": "tiny"},
    "25M": {
        "preset": "b32",
        "embed_dim": 256,
        "vision": {"width": 384, "layers": 6, "heads": 6},
        "text": {"width": 256, "layers": 6, "heads": 4},
        "decoder": {"layers": 6, "heads": 4},
    },
}


def toy_job(folder: Path, batch: int, model: str = "tiny", workers: int = 0, **train) -> dict:
    """A configuration that trains on toy shards in `folder`, which are made when they are not there."""
    if not (folder / "data").exists():
        make_toy(folder / "data", samples=2048, shards=4, val_samples=16)
        train_tokenizer(iter_captions(f"{folder}/data/train-*.tar", DataConfig()), folder / "tokenizer.model", 320)
    job = yaml.safe_load((ROOT / "configs/toy.yaml").read_text())
    job["run"]["dir"] = str(folder / "run")
    job["data"] |= {"train": f"{folder}/data/train-*.tar", "val": None, "workers": workers}
    job["tokenizer"] = {"path": str(folder / "tokenizer.model")}
    job["model"] = MODELS[model]
    job["train"] |= {"global_batch": batch, "samples": 10**9, "micro_batch": None, **train}
    job["eval"] = {}
    return job


class Setups:
    """Fleets by name that take turns: `measure` gives seconds a step, one reading a turn (its median), by name."""

    def __init__(self, turn: int):
        self._turn = turn
        self._stack = ExitStack()
        self._turns: dict[str, Callable[[], list[list[float]]]] = {}

    def add(self, name: str, job: dict, world: int, **how) -> None:
        fleet = self._stack.enter_context(Fleet(job, world, core=PINNED, **how))
        self._turns[name] = lambda: [fleet.steps(self._turn)]

    def add_together(self, name: str, job: dict, count: int) -> None:
        """`count` jobs of one process that all work at the same time and know nothing of one another."""
        fleets = [self._stack.enter_context(Fleet(job, 1, synthetic=True, core=core)) for core in range(count)]

        def turn() -> list[list[float]]:
            for fleet in fleets:
                fleet.begin(self._turn)
            return [fleet.end() for fleet in fleets]

        self._turns[name] = turn

    def measure(self, rounds: int, seconds: float) -> dict[str, list[float]]:
        readings: dict[str, list[float]] = {name: [] for name in self._turns}
        begun = time.monotonic()
        for number in range(rounds):
            for name, turn in self._turns.items():
                readings[name].append(float(np.mean([np.median(steps[1:]) for steps in turn()])))
            if number >= 2 and time.monotonic() - begun > seconds:
                break
        return readings

    def __enter__(self) -> "Setups":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()


class Scaling:
    """The parts of this benchmark, on toy shards in `folder`."""

    def __init__(
        self,
        report: Report,
        folder: Path,
        worlds: list[int],
        micro_batch: int,
        accumulation: int,
        rounds: int,
        seconds: float,
    ):
        self.report, self.folder, self.worlds = report, folder, worlds
        self.micro_batch, self.batch = micro_batch, micro_batch * accumulation
        self.turns = {model: max(2, turn // accumulation) for model, turn in TURNS.items()}
        self.facts = {"batch_per_process": self.batch}
        if accumulation > 1:
            self.facts["accumulation"] = accumulation
        self.rounds, self.seconds = rounds, seconds

    def job(self, world: int, **settings) -> dict:
        """For as many processes: the same batch for each of them."""
        return toy_job(
            self.folder, self.batch * world, **{"zero_stage": 1, "micro_batch": self.micro_batch, **settings}
        )

    def weak(self, model: str, peers: bool) -> None:
        """The same batch per process, ZeRO-1 and synthetic data, with the machine's ceiling and plain loops."""
        most = self.worlds[-1]
        with Setups(self.turns[model]) as setups:
            for world in self.worlds:
                setups.add(str(world), self.job(world, model=model), world, synthetic=True)
            if torch.cuda.device_count() == 0:
                setups.add_together("together", self.job(1, model=model), most)
            for peer in ("ddp", "deepspeed") if peers else ():
                setups.add(peer, self.job(most, model=model), most, synthetic=True, loop=peer)
            times = setups.measure(self.rounds, self.seconds)
        facts = {"model": model, **self.facts}
        for world in self.worlds:
            rate = [self.batch * world / each for each in times[str(world)]]
            self.report.add("weak, throughput", "samples/s", rate, "higher", processes=world, **facts)
        for world in self.worlds[1:]:
            efficiency = ratios(times["1"], times[str(world)])
            self.report.add("weak, efficiency", "ratio", efficiency, "higher", processes=world, **facts)
        if "together" in times:
            ceiling, of_it = ratios(times["1"], times["together"]), ratios(times["together"], times[str(most)])
            self.report.add("weak, this machine's ceiling", "ratio", ceiling, "neither", processes=most, **facts)
            self.report.add("weak, efficiency / ceiling", "ratio", of_it, "higher", processes=most, **facts)
        for peer in ("ddp", "deepspeed") if peers else ():
            share = ratios(times[str(most)], times[peer])
            self.report.add(f"step, mmscale / plain {peer}", "ratio", share, processes=most, **facts)

    def strong(self, model: str) -> None:
        """The same global batch: that of as many processes as there are, in the weak part."""
        most = self.worlds[-1]
        with Setups(self.turns[model]) as setups:
            for world in self.worlds:
                setups.add(str(world), self.job(most, model=model, micro_batch=None), world, synthetic=True)
            times = setups.measure(self.rounds, self.seconds)
        facts = {"model": model, "batch": self.batch * most}
        for world in self.worlds:
            rate = [self.batch * most / each for each in times[str(world)]]
            self.report.add("strong, throughput", "samples/s", rate, "higher", processes=world, **facts)
        for world in self.worlds[1:]:
            efficiency = [a / b / world for a, b in zip(times["1"], times[str(world)], strict=True)]
            self.report.add("strong, efficiency", "ratio", efficiency, "higher", processes=world, **facts)

    def loader_fed(self, model: str, workers: list[int]) -> None:
        """With every core at work on a step the loader has none of its own: its CPU time is what the step loses.

        What it can have for nothing is the time in which a process waits for another one's message.
        """
        most = self.worlds[-1]
        with Setups(self.turns[model]) as setups:
            setups.add("synthetic", self.job(most, model=model), most, synthetic=True)
            for number in workers:
                setups.add(f"{number}", self.job(most, model=model, workers=number), most)
            times = setups.measure(self.rounds, self.seconds)
        facts = {"model": model, "processes": most, **self.facts}
        for number in workers:
            share = ratios(times[str(number)], times["synthetic"])
            self.report.add("step, loader-fed / synthetic", "ratio", share, workers=number, **facts)
        cost = self.loader_cost(model)
        bound = [1 + each / float(np.median(times["synthetic"])) for each in cost]
        self.report.add("step, loader-fed / synthetic, by CPU time", "ratio", bound, "neither", **facts)

    def loader_cost(self, model: str) -> list[float]:
        """CPU seconds that one process's batch takes, read alone on one thread."""
        config = validate(self.job(1, model=model))
        image = config.model.vision.image_size or (64 if model == "tiny" else 224)
        stream = TrainStream(
            config.data, Tokenizer.load(config.tokenizer.path), image_size=image, context_length=32, seed=0,
            global_batch=self.batch, micro_batch=self.micro_batch, rank=0, world_size=1,
        )  # fmt: skip
        batches, readings = stream.batches(0), []
        for _ in range(self.rounds + 2):
            begun = time.process_time()
            next(batches)
            readings.append(time.process_time() - begun)
        stream.close()
        return readings[2:]

    def stages(self, model: str) -> None:
        most = self.worlds[-1]
        with Setups(self.turns[model]) as setups:
            for stage in range(4):
                setups.add(str(stage), self.job(most, model=model, zero_stage=stage), most, synthetic=True)
            times = setups.measure(self.rounds, self.seconds)
        for stage in range(4):
            rate = [self.batch * most / each for each in times[str(stage)]]
            self.report.add(
                "ZeRO stages, throughput", "samples/s", rate, "higher", processes=most, zero=stage, model=model
            )


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--processes", help="comma-separated numbers of processes (default: 1 and all of this machine)"
    )
    options.add_argument("--models", help=f"comma-separated, of: {', '.join(MODELS)} (default: all; quick: tiny)")
    options.add_argument("--parts", help=f"comma-separated, of: {', '.join(PARTS)} (default: all; quick: weak, loader)")
    options.add_argument("--batch", type=int, default=32, help="samples of a micro-batch")
    options.add_argument("--accumulation", type=int, default=1, help="micro-batches of each process in a step")
    options.add_argument("--rounds", type=int, help="turns of each set-up (default: 50, quick: 6)")
    options.add_argument("--seconds", type=float, default=120, help="of each part: fewer rounds when they take longer")
    args = options.parse_args()
    most = torch.cuda.device_count() or 2
    worlds = [int(n) for n in args.processes.split(",")] if args.processes else sorted({1, most})
    assert worlds[0] == 1, "efficiency is against one process"
    parts = (args.parts or ("weak,loader" if args.quick else ",".join(PARTS))).split(",")
    if args.accumulation > 1 and not {"peers", "strong"}.isdisjoint(parts):
        options.error("--accumulation: the peers take one micro-batch a step, and strong scaling splits one")
    models = (args.models or ("tiny" if args.quick else ",".join(MODELS))).split(",")
    report = Report("scaling")
    with tempfile.TemporaryDirectory() as scratch:
        rounds = args.rounds or (6 if args.quick else 50)
        scaling = Scaling(report, Path(scratch), worlds, args.batch, args.accumulation, rounds, args.seconds)
        for model in models:
            if "weak" in parts:
                scaling.weak(model, peers="peers" in parts)
            if "strong" in parts:
                scaling.strong(model)
        if "loader" in parts:
            scaling.loader_fed(models[0], [0] if args.quick else [0, 1, 2])
        if "stages" in parts:
            scaling.stages(models[0])
    report.finish(args.output)


if __name__ == "__main__":
    main()
