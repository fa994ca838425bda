"""What ends a run before its last sample, agreed on by all ranks: signals, a STOP file, a time limit."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from mmscale.train.engine import Processes

# A launcher may send several signals for one Ctrl-C; only a second SIGINT this long after the first means it.
IMPATIENCE_S = 3.0


class StopRequests:
    """Notes SIGTERM, SIGINT, SIGUSR1, a file `run.dir/STOP` and the end of `max_minutes`; the loop asks once a step."""

    NAMES = ("", "SIGTERM", "SIGINT", "SIGUSR1", "STOP file", "run.max_minutes")

    def __init__(self, stop_file: Path | None, max_minutes: float | None):
        self._stop_file = stop_file
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._code = 0
        self._first_sigint: float | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            number = getattr(signal, name)
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_sigint is not None and now - self._first_sigint >= IMPATIENCE_S:
                raise KeyboardInterrupt
            self._first_sigint = self._first_sigint or now
        self._code = self._code or self.NAMES.index(signal.Signals(number).name)

    def code(self) -> int:
        """0, or which of NAMES asks for a stop on this rank."""
        if not self._code and self._stop_file is not None and self._stop_file.exists():
            self._code = self.NAMES.index("STOP file")
        if not self._code and self._deadline is not None and time.monotonic() > self._deadline:
            self._code = self.NAMES.index("run.max_minutes")
        return self._code


@dataclass(frozen=True)
class Exchange:
    """What all ranks know after a step: sums and maxima over them, of numbers that never touched the device."""

    stop: int  # largest code of StopRequests
    save_failed: bool
    save_busy: bool
    data_wait_s: float  # of the slowest rank
    data_wait_rank: int
    num_bad: int
    num_tokens: int
    num_padded_tokens: int


def exchange(
    processes: Processes,
    *,
    stop: int,
    save_failed: bool,
    save_busy: bool,
    data_wait_s: float,
    num_bad: int,
    num_tokens: int,
    num_padded_tokens: int,
) -> Exchange:
    """One round over the CPU's process group; every rank calls it once a step."""
    # The rank travels in the low bits of the time it waited, so that one maximum tells both.
    wait = int(data_wait_s * 1e6) << 20 | processes.rank
    maxima = torch.tensor([stop, int(save_failed), int(save_busy), wait], dtype=torch.int64)
    sums = torch.tensor([num_bad, num_tokens, num_padded_tokens], dtype=torch.int64)
    if processes.world_size > 1:
        works = [
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=processes.control, async_op=True),
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=processes.control, async_op=True),
        ]
        for work in works:
            work.wait()
    stop, failed, busy, wait = maxima.tolist()
    return Exchange(stop, bool(failed), bool(busy), (wait >> 20) / 1e6, wait & 0xFFFFF, *sums.tolist())
