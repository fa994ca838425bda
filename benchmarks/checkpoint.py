"""How long a save keeps training waiting, beside a training step and beside the whole save.

    python -m benchmarks.checkpoint [--quick] [--output FILE.json]

For each model: the time of a training step, the stall (until the step loop goes on), the whole save (until the commit),
and reading it all back. Nothing else runs meanwhile; the folder is a temporary one.
"""

import tempfile
import time
from pathlib import Path

from benchmarks.common import Report, parser
from benchmarks.overhead import VOCABULARY, make_batch
from mmscale.checkpoint import Checkpoint
from mmscale.config import ModelConfig, validate
from mmscale.model.presets import build_model, build_model_config
from mmscale.objectives.pretraining import PretrainingObjective, forward_backward
from mmscale.train.engine import Engine, start_processes
from mmscale.train.saving import Saver

MODELS = {"toy": ("tiny", 32), "250M": ("b32", 8)}  # preset, batch


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__.splitlines()[0]).parse_args(argv)
    report = Report("checkpoint")
    for name, (preset, batch_size) in MODELS.items():
        if not (args.quick and name != "toy"):
            measure(report, name, preset, batch_size, saves=10 if name == "toy" else 3)
    report.finish(args.output)


def measure(report: Report, name: str, preset: str, batch_size: int, saves: int) -> None:
    """Adds the times of steps, stalls, saves and a restore of one model in this process, ZeRO stage 1, fp32."""
    processes = start_processes()
    sizes = build_model_config(ModelConfig(preset=preset), VOCABULARY)
    config = validate({"run": {"dir": "."}, "train": {"samples": 1, "global_batch": batch_size, "zero_stage": 1}})
    objective = PretrainingObjective(build_model(sizes), config.objective)
    engine = Engine(objective, forward_backward, config, processes)
    batch = make_batch(batch_size, sizes.vision_config.image_size)
    steps, stalls, totals = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), processes, keep_last=1)
        for step in range(saves + 1):
            start = time.perf_counter()
            engine.step([batch], lr=1e-4)
            steps.append(time.perf_counter() - start)
            saver.save(engine.state, {"step": step, "samples": step, "config": {}})
            saved = saver.flush()
            assert saved.error is None, saved.error
            stalls.append(saved.stall_s)
            totals.append(saved.total_s)
        start = time.perf_counter()
        engine.state.restore(Checkpoint.open(saved.folder))
        restore = time.perf_counter() - start
        size = sum(file.stat().st_size for file in saved.folder.iterdir()) / 1e9
    steps, stalls, totals = steps[1:], stalls[1:], totals[1:]  # the first of each warms up
    report.add("training step", "s", steps, model=name, batch=batch_size)
    report.add("save: training waits", "s", stalls, model=name, gigabytes=round(size, 2))
    report.add("save: until the commit", "s", totals, model=name, gigabytes=round(size, 2))
    report.add("verify and restore", "s", [restore], model=name)
    report.add("wait / step", "ratio", [a / b for a, b in zip(stalls, steps, strict=True)], model=name)
    report.add("wait / whole save", "ratio", [a / b for a, b in zip(stalls, totals, strict=True)], model=name)


if __name__ == "__main__":
    main()
