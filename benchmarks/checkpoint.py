"""What a save costs: training's wait, the whole save and the way back, beside DeepSpeed's own `save_checkpoint`.

    python -m benchmarks.checkpoint [--quick] [--processes 1,2] [--models toy,250M] [--output FILE.json]

For each model and number of processes, in turn: a training step; a save with nothing beside it (the stall, until the
step loop goes on; the total, until the commit); a save with a step beside it; DeepSpeed's save of the same engine,
during which training stands still. Then reading back, where mmscale first sums every file, each process a part of them.
mmscale's files are synced to disk before a save counts as done; DeepSpeed's are not, so the time to sync them is given
apart.
"""

import multiprocessing
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Report, parser, ratios
from benchmarks.overhead import VOCABULARY, make_batch

MODELS = {"toy": ("tiny", 32, 10), "250M": ("b32", 4, 3)}  # preset, samples of each process, rounds


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--processes", default="1,2", help="comma-separated numbers of processes, one thread each")
    options.add_argument("--models", help="comma-separated, of: toy, 250M (default: both, quick: toy)")
    options.add_argument("--rounds", type=int, help="readings of each case (default: 10 of toy, 3 of 250M)")
    args = options.parse_args(argv)
    models = args.models.split(",") if args.models else ["toy"] if args.quick else list(MODELS)
    report = Report("checkpoint")
    for name in models:
        for world_size in map(int, args.processes.split(",")):
            add(report, measure(name, world_size, args.rounds), model=name, processes=world_size)
    report.finish(args.output)


def add(report: Report, readings: dict[str, list[float]], **facts: Any) -> None:
    """The rows of one model and one number of processes."""
    (ours,), (theirs,) = readings.pop("size"), readings.pop("DeepSpeed's size")
    facts |= {"gigabytes": round(ours, 3)}
    seconds = {name: values for name, values in readings.items() if values}
    for case, values in seconds.items():
        report.add(case, "s", values, **facts | ({"gigabytes": round(theirs, 3)} if "DeepSpeed" in case else {}))
    pairs = {
        "stall / step": ("save: stall", "step"),
        "stall / whole save": ("save: stall", "save: total"),
        "step beside a save / step": ("step beside a save", "step"),
        "stall / DeepSpeed's save": ("save: stall", "DeepSpeed: save, which training waits for"),
        "restore / DeepSpeed's": ("restore, sums checked", "DeepSpeed: load"),
    }
    for case, (above, below) in pairs.items():
        report.add(case, "ratio", ratios(seconds[above], seconds[below]), **facts)


def measure(name: str, world_size: int, rounds: int | None) -> dict[str, list[float]]:
    """Readings by case, as rank 0 took them; ranks meet before and after what is timed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_work, args=(rank, world_size, port, name, rounds, folder, there))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        there.close()
        try:
            return here.recv()
        except EOFError:
            raise SystemExit(f"{name}, {world_size} processes: ended before anything was measured") from None
        finally:
            for process in ranks:
                process.join()


def _work(rank: int, world_size: int, port: int, name: str, rounds: int | None, folder: str, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    from mmscale.checkpoint import Checkpoint, find_damage
    from mmscale.config import ModelConfig, validate
    from mmscale.model.presets import build_model, build_model_config
    from mmscale.objectives.pretraining import PretrainingObjective, forward_backward
    from mmscale.train.engine import Engine, start_processes
    from mmscale.train.saving import Saver

    torch.set_num_threads(1)
    preset, batch_size, usual_rounds = MODELS[name]
    processes = start_processes()
    sizes = build_model_config(ModelConfig(preset=preset), VOCABULARY)
    batches = {"global_batch": batch_size * world_size, "micro_batch": batch_size}
    config = validate({"run": {"dir": "."}, "train": {"samples": 1, "zero_stage": 1, **batches}})
    engine = Engine(PretrainingObjective(build_model(sizes), config.objective), forward_backward, config, processes)
    batch = make_batch(batch_size, sizes.vision_config.image_size)
    saver = Saver(Path(folder) / "ours", processes, keep_last=1)
    theirs = Path(folder) / "theirs"
    readings: dict[str, list[float]] = defaultdict(list)

    def timed(case: str, run: Callable[[], object]) -> Any:
        dist.barrier()
        start = time.perf_counter()
        result = run()
        dist.barrier()
        readings[case].append(time.perf_counter() - start)
        return result

    def step() -> None:
        engine.step([batch], lr=1e-6)

    def save(number: int) -> None:
        saver.save(engine.state, {"step": number, "samples": number, "config": {}})

    def ended() -> Any:
        saved = saver.flush()
        assert saved.error is None, saved.error
        return saved

    def restore() -> None:
        assert not any(processes.gather(find_damage(saved.folder, share=(rank, world_size))))
        engine.state.restore(Checkpoint.open_verified(saved.folder))

    for number in range((rounds or usual_rounds) + 1):
        timed("step", step)
        dist.barrier()
        save(2 * number)
        saved = ended()
        readings["save: stall"].append(saved.stall_s)
        readings["save: total"].append(saved.total_s)
        save(2 * number + 1)
        timed("step beside a save", step)
        saved = ended()
        timed("DeepSpeed: save, which training waits for", lambda: engine.deepspeed.save_checkpoint(theirs, tag="only"))
        if processes.is_main:
            start = time.perf_counter()
            for file in (theirs / "only").iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            readings["DeepSpeed: sync what it wrote"].append(time.perf_counter() - start)
    for _ in range(4):
        timed("restore, sums checked", restore)
        timed("DeepSpeed: load", lambda: engine.deepspeed.load_checkpoint(theirs, tag="only"))
    if processes.is_main:
        warm = {case: values[1:] for case, values in readings.items()}  # the first of each warms up
        sizes_gb = {"size": [_gigabytes(saved.folder)], "DeepSpeed's size": [_gigabytes(theirs / "only")]}
        answers.send(warm | sizes_gb)
    dist.barrier()
    os._exit(0)  # the end of process groups is not worth waiting for


def _gigabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e9


if __name__ == "__main__":
    main()
