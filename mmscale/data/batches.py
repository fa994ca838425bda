"""Batches, and the threads that fill them: each row is written straight into its batch, whoever reads it."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmscale.data.buffers import PixelBuffers

logger = logging.getLogger(__name__)

PREFETCH = 2  # batches that are read ahead, beside the one in work
ROWS_PER_TASK = 8

_buffers = PixelBuffers()


@dataclass(frozen=True)
class BadSample:
    """A slot of a batch that is masked, and why."""

    position: int
    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """One micro-batch of one rank.

    pixel_values: uint8 [batch, 3, height, width], channels-last in memory. input_ids: int64 [batch, length],
    right-padded. lengths: int64 [batch], tokens with start and end, 0 in a masked slot. valid: bool [batch], False
    where the sample is bad. positions: int64 [batch], in the stream. keys: "shard/key" of each row.
    """

    pixel_values: Tensor
    input_ids: Tensor
    lengths: Tensor
    valid: Tensor
    positions: Tensor
    keys: list[str]
    bad: list[BadSample]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {f.name: function(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)


@dataclass
class EvalBatch(Batch):
    """A Batch with each sample's parsed .json (empty when it has none) and all its captions (none for a bad sample)."""

    records: list[dict]
    captions: list[list[str]]


@dataclass
class LabelledBatch(EvalBatch):
    """An EvalBatch of a training stream; `sources` says from which of `data.sources` each row comes."""

    sources: list[int]


@dataclass
class Row:
    """What a row holds beside its pixels. No ids: the slot is masked, for `reason` unless it only fills up."""

    shard: str = ""
    key: str = ""
    ids: list[int] = field(default_factory=list)
    reason: str | None = None
    record: dict = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    source: int = 0


ReadRow = Callable[[Any, int, np.ndarray], Row]
"""(place, position, pixels to fill [size, size, 3]) -> Row"""


class BatchBuilder:
    """A batch in the making. `places` says to `read` where each row comes from."""

    def __init__(self, read: ReadRow, places: list, positions: Sequence[int], image_size: int, slow_sample_s: float):
        # Channels last, as the resize leaves them: a row is copied in one piece.
        self._pixels = _buffers.take(len(positions), image_size, image_size, 3)
        self._memory = self._pixels.numpy()
        self._read, self._places, self._positions = read, places, positions
        self._slow_sample_s = slow_sample_s
        self._rows: list[Row] = [Row()] * len(positions)

    def tasks(self) -> Iterator[Callable[[], None]]:
        """Pieces of work that may run in any order, on any thread."""
        for start in range(0, len(self._positions), ROWS_PER_TASK):
            yield lambda start=start: self._fill(start, min(start + ROWS_PER_TASK, len(self._positions)))

    def batch(self, pad_id: int, context_length: int) -> Batch:
        """The batch, when all tasks are done."""
        return Batch(**self._parts(pad_id, context_length))

    def eval_batch(self, pad_id: int, context_length: int) -> EvalBatch:
        records, captions = [row.record for row in self._rows], [row.captions for row in self._rows]
        return EvalBatch(**self._parts(pad_id, context_length), records=records, captions=captions)

    def labelled_batch(self, pad_id: int, context_length: int) -> LabelledBatch:
        batch = self.eval_batch(pad_id, context_length)
        return LabelledBatch(**vars(batch), sources=[row.source for row in self._rows])

    def _fill(self, start: int, stop: int) -> None:
        for number in range(start, stop):
            begun = time.monotonic()
            row = self._read(self._places[number], self._positions[number], self._memory[number])
            self._rows[number] = row
            if not row.ids:
                self._memory[number] = 0
            if (took := time.monotonic() - begun) > self._slow_sample_s:
                logger.warning("%s/%s took %.1f s to read (data.slow_sample_s)", row.shard, row.key, took)

    def _parts(self, pad_id: int, context_length: int) -> dict:
        lengths = [len(row.ids) for row in self._rows]
        columns = trimmed_length(max(lengths), context_length)
        padded = [row.ids + [pad_id] * (columns - len(row.ids)) for row in self._rows]
        lengths = torch.tensor(lengths)
        return {
            "pixel_values": self._pixels.permute(0, 3, 1, 2),
            "input_ids": torch.tensor(padded, dtype=torch.int64),
            "lengths": lengths,
            "valid": lengths > 0,
            "positions": torch.tensor(list(self._positions)),
            "keys": [f"{row.shard}/{row.key}" if row.shard else "" for row in self._rows],
            "bad": [
                BadSample(position, row.shard, row.key, row.reason)
                for position, row in zip(self._positions, self._rows, strict=True)
                if row.reason is not None
            ],
        }


def trimmed_length(longest: int, context_length: int) -> int:
    """Columns for captions of up to `longest` tokens: a multiple of 8 with the CLS token, where the context allows."""
    return min(context_length, -(-(longest + 1) // 8) * 8 - 1)


@dataclass
class Plan:
    """A piece of work: tasks that may run in any order on any thread, and what to make of them when all are done."""

    tasks: list[Callable[[], None]]
    finish: Callable[[], Any]


class Workers:
    """Runs plans in order: ahead of time on `num_threads` threads, or with 0 threads when they are asked for.

    Decoding, resizing and tokenizing release the interpreter lock; threads need no copies between processes.
    """

    def __init__(self, num_threads: int):
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="loader") if num_threads else None

    def run(self, plans: Iterator[Plan]) -> Iterator:
        if self._pool is None:
            for plan in plans:
                for task in plan.tasks:
                    task()
                yield plan.finish()
            return
        ahead: deque[tuple[Plan, list[Future]]] = deque()
        try:
            while True:
                while len(ahead) <= PREFETCH and (plan := next(plans, None)) is not None:
                    ahead.append((plan, [self._pool.submit(task) for task in plan.tasks]))
                if not ahead:
                    return
                plan, futures = ahead.popleft()
                for future in futures:
                    future.result()
                yield plan.finish()
        finally:
            for _, futures in ahead:
                for future in futures:
                    future.cancel()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
