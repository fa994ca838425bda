"""Several real processes that compute together, started once for many cases."""

import datetime
import importlib
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


@contextmanager
def process_pool(size: int, folder: Path) -> Iterator["ProcessPool"]:
    """`size` processes, in which functions of test modules run on process groups of gloo."""
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue() for _ in range(size)]
    answers = context.Queue()
    workers = [context.Process(target=_serve, args=(rank, queues[rank], answers)) for rank in range(size)]
    for worker in workers:
        worker.start()
    try:
        yield ProcessPool(queues, answers, folder)
    finally:
        for queue in queues:
            queue.put(None)
        for worker in workers:
            worker.join(20)
            worker.kill()


class ProcessPool:
    def __init__(self, queues: list, answers: Any, folder: Path):
        self.queues, self.answers, self.folder, self.calls = queues, answers, folder, 0

    def run(self, function, world_size: int, *args) -> list[Any]:
        """`function(*args)` on ranks 0 to world_size - 1; what each returns, through a file (so tensors are fine)."""
        self.calls += 1
        store = self.folder / f"call_{self.calls}"
        job = (function.__module__, function.__name__, world_size, str(store), args)
        for queue in self.queues[:world_size]:
            queue.put(job)
        failures = [failure for _ in range(world_size) if (failure := self.answers.get(timeout=100)) is not None]
        assert not failures, failures[0]
        return [torch.load(f"{store}.{rank}.pt") for rank in range(world_size)]


def _serve(rank: int, jobs: Any, answers: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        module, function, world_size, store, args = job
        failure = None
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=60),
            )
            torch.save(getattr(importlib.import_module(module), function)(*args), f"{store}.{rank}.pt")
            dist.barrier()
        except Exception:
            failure = f"rank {rank}:\n{traceback.format_exc()}"
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        answers.put(failure)
