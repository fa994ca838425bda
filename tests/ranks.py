"""Runs a function on several ranks: processes that are forked from one that has already imported everything."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["mmscale.train.pretraining", "transformers.generation.utils"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world_size: int, function: Callable, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """What `function(*args)` returns on each of `world_size` ranks, in a process group of their own.

    `function` must be importable. Raises AssertionError with the traceback of the first rank that failed.
    """
    port = free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        here, there = context.Pipe()
        process = context.Process(target=_run, args=(there, rank, world_size, port, function, args), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout_s), f"rank {rank} gave no answer within {timeout_s:.0f} s"
            failure, result = pickle.loads(pipe.recv_bytes())
            assert failure is None, f"rank {rank}:\n{failure}"
            results.append(result)
    finally:
        for process in processes:
            process.kill() if len(results) < world_size else None
            process.join(30)
    return results


def _run(pipe: Any, rank: int, world_size: int, port: int, function: Callable, args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    try:
        answer = (None, function(*args))
    except (Exception, KeyboardInterrupt):
        answer = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(answer))  # by value: tensors in shared memory would end with this process
    pipe.close()
    os._exit(0)  # process groups and their threads are not worth an orderly end
