"""Training processes that take turns: each works only while it is told to, so that readings of two set-ups alternate.

    with Fleet({"data": ..., ...}, world_size=2) as two, Fleet({...}, world_size=1) as one:
        for _ in range(rounds):
            a, b = one.steps(5), two.steps(5)          # seconds of each step; the other fleet sleeps meanwhile

A process started by a Fleet runs this file: it builds what `mmscale train` builds, and steps it without the rest of the
loop.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180


class Fleet:
    """One training job of `world_size` processes.

    Args:
        config: as a YAML file would say it, with `run.dir` and all data paths.
        synthetic: the first few batches again and again in place of the loader.
        threads: of each process.
        command: what each process runs, in place of this file; it speaks the same lines (see `serve`).
    """

    def __init__(
        self,
        config: dict,
        world_size: int = 1,
        synthetic: bool = False,
        threads: int = 1,
        command: list[str] | None = None,
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = json.dumps({"config": config, "synthetic": synthetic})
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
                )
            )
        self.facts: dict = self._read("ready")

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` steps, waiting for their data included."""
        self._processes[0].stdin.write(f"{count}\n")
        self._processes[0].stdin.flush()
        return self._read("seconds")

    def close(self) -> None:
        self._processes[0].stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self, key: str):
        for line in self._processes[0].stdout:
            if line.startswith("{"):
                return json.loads(line)[key]
        self.close()
        raise RuntimeError(f"the training process ended with {self._processes[0].returncode}")


def serve(step, world_size: int, rank: int, agree, facts: dict) -> None:
    """The process's side: `step()` runs one step; `agree(count)` gives every rank what rank 0 was told."""
    if rank == 0:
        print(json.dumps({"ready": facts}), flush=True)
    while True:
        line = sys.stdin.readline() if rank == 0 else ""
        count = agree(int(line) if line.strip() else 0)
        if not count:
            return
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        if rank == 0:
            print(json.dumps({"seconds": seconds}), flush=True)


def main() -> None:
    import itertools

    from mmscale.config import validate
    from mmscale.train.engine import Engine, start_processes
    from mmscale.train.pretraining import build_pretraining

    begun = time.perf_counter()
    job = json.loads(os.environ["MMSCALE_BENCHMARK_JOB"])
    config = validate(job["config"])
    processes = start_processes()
    task = build_pretraining(config, processes)
    engine = Engine(task.objective, task.forward_backward, config, processes)
    batches = iter(task.stream.batches(0))
    if job["synthetic"]:
        batches = itertools.cycle([next(batches) for _ in range(4)])

    def step() -> None:
        engine.step(next(batches), config.optim.lr)

    step()
    facts = {
        "parameters": sum(p.numel() for p in task.objective.parameters()),
        "start_s": round(time.perf_counter() - begun, 3),
    }
    serve(step, processes.world_size, processes.rank, processes.broadcast, facts)
    task.stream.close()


if __name__ == "__main__":
    main()
