"""What mmscale's training loop costs beside a bare DeepSpeed loop on the same model and batches.

    python -m benchmarks.overhead [--quick] [--output FILE.json]

Both loops run in one process and take turns, step by step: forward, backward and update by DeepSpeed on one side; the
same with everything that mmscale does around it (learning rate, guards, the exchange between ranks, metrics, hooks) on
the other. The batches are in memory on both sides, so that reading data is out of the comparison.
"""

import tempfile
import time
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch

from benchmarks.common import Report, parser, ratios
from mmscale.config import Config, ModelConfig, validate
from mmscale.model.presets import build_model, build_model_config
from mmscale.objectives.pretraining import PretrainingObjective, forward_backward
from mmscale.train.engine import Processes, deepspeed_config
from mmscale.train.optimizer import build_optimizer
from mmscale.train.task import Task
from mmscale.train.trainer import run

VOCABULARY, WORDS, BATCH = 512, 23, 32


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__.splitlines()[0]).parse_args(argv)
    report = Report("overhead")
    for stage in (1,) if args.quick else (0, 1, 2, 3):
        compare(report, stage, rounds=30 if args.quick else 60)
    report.finish(args.output)


def compare(report: Report, stage: int, rounds: int, warmup: int = 5) -> None:
    """Adds the times of both loops' steps and their ratio, each pair taken side by side."""
    with tempfile.TemporaryDirectory() as folder:
        steps = rounds + warmup
        config = validate(
            {
                "run": {"dir": str(Path(folder) / "run")},
                "train": {"samples": steps * BATCH, "global_batch": BATCH, "zero_stage": stage},
                "log": {"every": 10},
            }
        )
        turns = _Turns(config)
        run(config, turns.build, hooks=[turns])
    ours, bare = turns.ours[warmup:], turns.bare[warmup:]
    report.add("mmscale", "s", ours, zero_stage=stage)
    report.add("bare DeepSpeed", "s", bare, zero_stage=stage)
    report.add("mmscale / bare DeepSpeed", "ratio", ratios(ours, bare), zero_stage=stage)


class _Turns:
    """A hook that makes the bare loop's step after each of mmscale's, and times both."""

    def __init__(self, config: Config):
        self._config = config
        self.ours: list[float] = []
        self.bare: list[float] = []
        self._mark: float | None = None

    def build(self, config: Config, processes: Processes) -> Task:
        settings = deepspeed_config(config, processes.world_size, processes.device)
        objective = _objective()
        self._batch = make_batch(BATCH, image_size=64)
        self._engine, _, _, _ = deepspeed.initialize(
            model=objective, optimizer=build_optimizer(objective, config.optim), config=settings
        )
        stream = SimpleNamespace(
            batches=lambda samples: repeat([self._batch]),
            state=lambda samples: {},
            epoch=lambda samples: 0.0,
            close=lambda: None,
        )
        return Task(_objective(), forward_backward, stream, tokenizer=None)

    def __call__(self, trainer, update) -> None:
        now = time.perf_counter()
        if self._mark is not None:
            self.ours.append(now - self._mark)
            start = time.perf_counter()
            forward_backward(self._engine, [self._batch], self._engine.backward)
            self._engine.step()
            self.bare.append(time.perf_counter() - start)
        self._mark = time.perf_counter()


def _objective() -> PretrainingObjective:
    torch.manual_seed(0)
    config = Config.model_validate({"run": {"dir": "."}, "train": {"samples": 1, "global_batch": 1}})
    return PretrainingObjective(build_model(build_model_config(ModelConfig(), VOCABULARY)), config.objective)


def make_batch(batch_size: int, image_size: int) -> SimpleNamespace:
    """Noise with the fields of the loader's batches."""
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        pixel_values=torch.randint(
            0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8, generator=generator
        ),
        input_ids=torch.randint(4, VOCABULARY, (batch_size, WORDS), generator=generator),
        lengths=torch.full((batch_size,), WORDS),
        valid=torch.ones(batch_size, dtype=torch.bool),
        positions=torch.arange(batch_size),
        bad=[],
    )


if __name__ == "__main__":
    main()
