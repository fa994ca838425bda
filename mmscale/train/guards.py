"""What keeps a run from going wrong quietly: stops that all ranks agree on, and updates that are not made."""

import math
import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from mmscale.errors import UserError
from mmscale.train.engine import Processes

# A launcher may send several signals for one Ctrl-C; only a second SIGINT this long after the first means it.
IMPATIENCE_S = 3.0


class StopRequests:
    """Notes SIGTERM, SIGINT, SIGUSR1, a file `run.dir/STOP` and the end of `max_minutes`; the loop asks once a step.

    The minutes count from `begun` (of `time.monotonic`): a queue's clock runs while shards are indexed, too.
    """

    NAMES = ("", "SIGTERM", "SIGINT", "SIGUSR1", "STOP file", "run.max_minutes")

    def __init__(self, stop_file: Path | None, max_minutes: float | None, begun: float):
        self._stop_file = stop_file
        self._deadline = None if max_minutes is None else begun + 60 * max_minutes
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


class SpikeGuard:
    """Tells losses and gradient norms that leap out of what the last updates showed: above mean + 6 sigma over 128."""

    WINDOW, FEWEST, SIGMAS = 128, 32, 6.0

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=self.WINDOW) for name in ("loss", "grad_norm")}

    def allows(self, **values: float) -> bool:
        """True for values that are no spike, which then belong to what later ones are compared with."""
        if any(self._leaps(self._seen[name], value) for name, value in values.items()):
            return False
        for name, value in values.items():
            self._seen[name].append(value)
        return True

    def _leaps(self, seen: deque[float], value: float) -> bool:
        if not math.isfinite(value):
            return True
        if len(seen) < self.FEWEST:
            return False
        mean = sum(seen) / len(seen)
        sigma = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
        return value > mean + self.SIGMAS * sigma

    def state(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._seen.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        for name, values in state.items():
            self._seen[name].extend(values)


class SkipCounter:
    """Counts skipped updates; too many in a row end the run."""

    def __init__(self, max_in_a_row: int):
        self._max = max_in_a_row
        self.total = self.in_a_row = 0

    def add(self, skipped: bool) -> None:
        """Raises UserError after `max_in_a_row` updates that were not made."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self._max:
            raise UserError(
                f"train.max_skips: {self.in_a_row} updates in a row were skipped, because their loss or gradient was "
                f"not finite or leapt; lower optim.lr, lengthen optim.warmup_samples, or look at the data there"
            )
