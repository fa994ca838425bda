"""Saving beside training: the step loop waits for a copy to host memory, a thread writes it."""

import shutil
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.checkpoint import BEST, MANIFEST, commit, folder_name, remove_old, write_fragments, write_whole
from mmscale.train.engine import Processes
from mmscale.train.state import TrainState


@dataclass(frozen=True)
class Saved:
    """A save that has ended: committed, or why not."""

    folder: Path
    step: int
    samples: int
    stall_s: float  # that training waited
    total_s: float  # until the commit
    error: str | None


class Saver:
    """Writes this rank's part of checkpoints; `save` and `flush` are called by all ranks, at the same step.

    One save is under way at a time: the next one waits for it. No collective runs in the thread, so that it can never
    cross one of the step loop's; rank 0's thread learns from files that the others are done.
    """

    def __init__(self, checkpoints: Path, processes: Processes, *, keep_last: int, keep_every: int | None = None):
        self._checkpoints, self._processes = checkpoints, processes
        self._keep = (keep_last, keep_every)
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._abandoned = threading.Event()
        self._error: str | None = None
        self._ended = 0.0
        self._pending: tuple[Path, int, int, float, float] | None = None
        self.step: int | None = None  # of the newest checkpoint that is committed or under way
        self._best: int | None = None

    def save(self, state: TrainState, facts: dict[str, Any], tokenizer: Path | None = None) -> Saved | None:
        """Copies the state and starts to write it. Returns how the save before it ended, if there was one."""
        start = time.perf_counter()
        previous = self.flush()
        folder = self._checkpoints / folder_name(facts["step"])
        if self._processes.is_main:
            _clear(folder)
        nonce = self._processes.broadcast(uuid.uuid4().hex)
        fragments = state.fragments()
        self._written.clear()
        self._abandoned.clear()
        self._error = None
        self.step = facts["step"]

        def write() -> None:
            try:
                try:
                    write_fragments(folder, self._processes.rank, fragments, nonce)
                finally:
                    fragments.clear()
                    self._written.set()
                if self._processes.is_main and not self._abandoned.is_set():
                    done = commit(
                        folder,
                        self._processes.world_size,
                        nonce,
                        facts,
                        tokenizer=tokenizer,
                        abandoned=self._abandoned.is_set,
                    )
                    if done:
                        remove_old(self._checkpoints, *self._keep, best=self._best)
            except Exception as error:  # any of them must reach the step loop, not end in a thread
                self._error = f"{type(error).__name__}: {error}"
            self._ended = time.perf_counter()

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        self._pending = (folder, facts["step"], facts["samples"], start, time.perf_counter() - start)
        return previous

    def keep_best(self, step: int) -> None:
        """The checkpoint of this step, committed or under way, outlives newer ones until another one is the best."""
        self._best = step
        if self._processes.is_main:
            write_whole(self._checkpoints / BEST, folder_name(step) + "\n", replace=True)

    @property
    def failed(self) -> bool:
        """True once this rank's part of the save under way has failed; told to the others with `abandon`."""
        return self._error is not None

    def abandon(self) -> None:
        """Another rank's part failed: rank 0 no longer waits for it."""
        self._abandoned.set()

    @property
    def is_busy(self) -> bool:
        """On rank 0 until the commit is made (or given up), elsewhere until this rank's part is written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_under_way(self) -> bool:
        """True on all ranks alike from `save` to `flush`."""
        return self._thread is not None

    def flush(self) -> Saved | None:
        """Waits until the save under way is committed on all ranks, and returns how it ended."""
        if self._thread is None:
            return None
        self._written.wait()
        if any(self._processes.gather(self._error)):
            self.abandon()
        self._thread.join()
        self._thread = None
        errors = self._processes.gather(self._error)
        first = next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error), None)
        folder, step, samples, start, stall = self._pending
        if first is not None:
            self.step = None
            if self._processes.is_main:
                _clear(folder)
        return Saved(folder, step, samples, stall, self._ended - start, first)


def _clear(folder: Path) -> None:
    """Removes what an earlier attempt left at this step; first it stops being a checkpoint, then it goes."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
