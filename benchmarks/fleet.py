"""Training processes that take turns: each works only while it is told to, so that readings of two set-ups alternate.

    with Fleet({"data": ..., ...}, world_size=2) as two, Fleet({...}, world_size=1) as one:
        for _ in range(rounds):
            a, b = one.steps(5), two.steps(5)          # seconds of each step; the other fleet sleeps meanwhile

A fleet is stopped (SIGSTOP) between its turns, loader threads and processes included: nothing is read ahead while the
other side is timed.

A process started by a Fleet runs this file: it builds what `mmscale train` builds, and steps it without the rest of the
loop. The peers `ddp` and `deepspeed` step the same model, losses and optimizer in a plain loop of their own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmscale.config import Config
    from mmscale.train.engine import Processes
    from mmscale.train.task import Task

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180


class Fleet:
    """One training job of `world_size` processes.

    Args:
        config: as a YAML file would say it, with `run.dir` and all data paths.
        synthetic: the first few batches again and again in place of the loader.
        loop: `mmscale`, or a plain loop with `ddp` (PyTorch's DistributedDataParallel) or `deepspeed`.
        threads: of each process.
        core: process r runs on this machine's core number `core` + r alone; None leaves that to the system, which is
            slow to find out that two processes share a core while the other one is idle.
        command: what each process runs, in place of this file; it speaks the same lines (see `serve` and `Gate`).
    """

    def __init__(
        self,
        config: dict,
        world_size: int = 1,
        synthetic: bool = False,
        loop: str = "mmscale",
        threads: int = 1,
        core: int | None = None,
        command: list[str] | None = None,
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        cores = sorted(os.sched_getaffinity(0))

        def settle(rank: int) -> None:
            # A process group of its own, so that a signal reaches its loader's processes too. Not a session of its own:
            # then nobody would end the stopped processes when their parent has died.
            os.setpgrp()
            if core is not None:
                os.sched_setaffinity(0, {cores[(core + rank) % len(cores)]})

        job = json.dumps({"config": config, "synthetic": synthetic, "loop": loop})
        self._processes = []
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(threads),
                "MMSCALE_BENCHMARK_JOB": job,
            }
            self._processes.append(
                subprocess.Popen(
                    command or [sys.executable, "-m", "benchmarks.fleet"],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    text=True,
                    preexec_fn=lambda rank=rank: settle(rank),
                )
            )
        self.facts: dict = self._read()["ready"]
        self.waited: list[float] = []  # of each of the last turn's steps, seconds that the loop waited for its batch
        self._signal(signal.SIGSTOP)

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` steps, waiting for their data included."""
        self.begin(count)
        return self.end()

    def begin(self, count: int) -> None:
        """Starts a turn of `count` steps; `end` waits for it. Between them another fleet may have its turn as well."""
        self._signal(signal.SIGCONT)
        self._processes[0].stdin.write(f"{count}\n")
        self._processes[0].stdin.flush()

    def end(self) -> list[float]:
        answer = self._read()
        self._signal(signal.SIGSTOP)
        self.waited = answer["waited"]
        return answer["seconds"]

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._processes[0].stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def _read(self) -> dict:
        for line in self._processes[0].stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.close()
        raise RuntimeError(f"the training process ended with {self._processes[0].returncode}")


class Gate:
    """The process's side where the loop is someone else's: the loop calls `passed` after each of its steps.

    The first step warms up. Between turns the call does not return; when there are no more turns it raises SystemExit.
    `waited` says for how many seconds of the step the loop waited for its batch.
    """

    def __init__(self, facts: dict, rank: int = 0, agree: Callable[[int], int] = lambda count: count):
        self._facts, self._rank, self._agree = facts, rank, agree
        self._left: int | None = None
        self._seconds: list[float] = []
        self._waited: list[float] = []
        self._mark = 0.0

    def passed(self, waited: float = 0.0) -> None:
        now = time.perf_counter()
        if self._left is None:
            self._say(ready=self._facts)
        else:
            self._seconds.append(now - self._mark)
            self._waited.append(waited)
            self._left -= 1
            if self._left == 0:
                self._say(seconds=self._seconds, waited=self._waited)
        if not self._left:
            line = sys.stdin.readline() if self._rank == 0 else ""
            self._left, self._seconds, self._waited = self._agree(int(line) if line.strip() else 0), [], []
            if not self._left:
                raise SystemExit(0)
            now = time.perf_counter()
        self._mark = now

    def _say(self, **values: object) -> None:
        if self._rank == 0:
            print(json.dumps(values), flush=True)


def serve(step: Callable[[], None], rank: int, agree: Callable[[int], int], facts: dict) -> None:
    """The process's side: `step()` runs one step; `agree(count)` gives every rank what rank 0 was told."""
    gate = Gate(facts, rank, agree)
    while True:
        step()
        gate.passed()


def main() -> None:
    import itertools

    from mmscale.config import validate
    from mmscale.train.engine import start_processes
    from mmscale.train.pretraining import build_pretraining

    begun = time.perf_counter()
    job = json.loads(os.environ["MMSCALE_BENCHMARK_JOB"])
    config = validate(job["config"])
    processes = start_processes()
    task = build_pretraining(config, processes)
    make_step = {"mmscale": our_step, "ddp": ddp_step, "deepspeed": deepspeed_step}[job["loop"]]
    update = make_step(task, config, processes)
    batches = iter(task.stream.batches(0))
    if job["synthetic"]:
        batches = itertools.cycle([next(batches) for _ in range(4)])

    def step() -> None:
        update(next(batches))

    step()
    facts = {
        "parameters": sum(p.numel() for p in task.objective.parameters()),
        "start_s": round(time.perf_counter() - begun, 3),
    }
    try:
        serve(step, processes.rank, processes.broadcast, facts)
    finally:
        task.stream.close()


def our_step(task: "Task", config: "Config", processes: "Processes") -> Callable[[list], None]:
    from mmscale.train.engine import Engine

    engine = Engine(task.objective, task.forward_backward, config, processes)
    return lambda micro_batches: engine.step(micro_batches, config.optim.lr)


def ddp_step(task: "Task", config: "Config", processes: "Processes") -> Callable[[list], None]:
    """One micro-batch a step, as in PyTorch's own example of DistributedDataParallel; gradients are clipped."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from mmscale.train.optimizer import build_optimizer

    model = DistributedDataParallel(task.objective) if processes.world_size > 1 else task.objective
    optimizer = build_optimizer(task.objective, config.optim)

    def step(micro_batches: list) -> None:
        (batch,) = micro_batches
        task.forward_backward(model, [batch], lambda loss: loss.backward())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed_step(task: "Task", config: "Config", processes: "Processes") -> Callable[[list], None]:
    """One micro-batch a step, as in DeepSpeed's getting started guide."""
    import deepspeed

    from mmscale.train.engine import deepspeed_config
    from mmscale.train.optimizer import build_optimizer

    settings = deepspeed_config(config, processes.world_size, processes.device)
    optimizer = build_optimizer(task.objective, config.optim)
    engine, _, _, _ = deepspeed.initialize(model=task.objective, optimizer=optimizer, config=settings)

    def step(micro_batches: list) -> None:
        (batch,) = micro_batches
        task.forward_backward(engine, [batch], engine.backward)
        engine.step()

    return step


if __name__ == "__main__":
    main()
