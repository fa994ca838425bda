"""Ends a job that hangs, and leaves on disk where every rank was standing."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmscale.train.engine import Processes

# What comes before the first step's end (building indexes, compiling, filling caches) may take so many times longer.
PATIENCE_AT_FIRST = 10.0
# For the ranks of this machine to write their own stacks, before their state is read from outside.
GRACE_S = 5.0
# After this much more, the interpreter itself must be stuck: the C library's timer ends the process.
LAST_RESORT_S = 30.0


class Watchdog:
    """A thread that expects `beat()` at least every `hang_s` seconds.

    When it does not come, this rank writes its Python stacks to `folder`; ranks of the same machine that do not do so
    themselves (stopped, or stuck in a system call) are described from /proc and killed; then `on_hang` is told, and the
    process ends with 1.
    """

    def __init__(self, folder: Path, processes: Processes, hang_s: float, on_hang: Callable[[str], None]):
        self._on_hang = on_hang
        self._folder, self._rank, self._hang_s = folder, processes.rank, hang_s
        self._neighbours = {
            rank: pid
            for rank, (host, pid) in enumerate(processes.gather((processes.host, os.getpid())))
            if host == processes.host and rank != processes.rank
        }
        self._limit = hang_s * PATIENCE_AT_FIRST
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        self._last = time.monotonic()
        self._limit = self._hang_s

    @contextmanager
    def patience(self, factor: float = PATIENCE_AT_FIRST) -> Iterator[None]:
        """Around what takes longer than a step: an evaluation, the end of a save."""
        self._last, self._limit = time.monotonic(), self._hang_s * factor
        yield
        self.beat()

    def _watch(self) -> None:
        interval = min(1.0, self._hang_s / 4)
        while not self._ended.wait(interval):
            # Fires when this thread, too, no longer gets to run.
            faulthandler.dump_traceback_later(self._limit + LAST_RESORT_S, exit=True)
            if time.monotonic() - self._last > self._limit:
                self._end_it()

    def _end_it(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._stacks(self._rank).open("w") as file:
            file.write(f"rank {self._rank}, process {os.getpid()}: no step for {self._limit:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        deadline = time.monotonic() + GRACE_S
        silent = dict(self._neighbours)
        while silent and time.monotonic() < deadline:
            time.sleep(0.1)
            silent = {rank: pid for rank, pid in silent.items() if not self._stacks(rank).exists()}
        for rank, pid in silent.items():
            self._stacks(rank).write_text(describe_process(rank, pid))
        reason = f"rank {self._rank}: no step for {self._limit:.0f} s"
        print(f"{reason}, giving up; stacks are in {self._folder}", flush=True)
        with suppress(OSError):
            self._on_hang(reason)
        for pid in silent.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it would outlive the signals that launchers send
        os._exit(1)

    def _stacks(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.txt"


def describe_process(rank: int, pid: int) -> str:
    """What the kernel tells about a process that cannot tell for itself."""
    lines = [f"rank {rank}, process {pid}: wrote no stacks itself; from /proc:"]
    for name in ("status", "wchan", "syscall", "stack"):
        try:
            lines.append(f"--- {name}\n{Path(f'/proc/{pid}/{name}').read_text()}")
        except OSError as error:
            lines.append(f"--- {name}: {error.strerror}")
    return "\n".join(lines) + "\n"
