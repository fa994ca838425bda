"""Batches of images and captions: the endless training stream, and finite sets for evaluation.

Threads read, decode and tokenize (the heavy parts release the interpreter lock); each row is written straight into its
batch. Nothing depends on which thread reads which row.
"""

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from mmscale.config import DataConfig, Paths
from mmscale.data.buffers import PixelBuffers
from mmscale.data.captions import SampleError
from mmscale.data.order import ORDER_VERSION, MixtureOrder, Place, StreamOrder
from mmscale.data.paths import expand, is_remote
from mmscale.data.prefetch import Prefetch
from mmscale.data.samples import BadSample, SampleReader
from mmscale.data.shards import RawSample, Shards
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError

logger = logging.getLogger(__name__)

PREFETCH = 2  # global batches that are read ahead
ROWS_PER_TASK = 8
NO_POSITION = -1

_buffers = PixelBuffers()


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


class TrainStream:
    """The endless stream of one rank's training batches; its whole state is the number of samples consumed.

    Global batch k holds the positions [k * global_batch, (k + 1) * global_batch); rank r of W takes every W-th of them,
    from the r-th on, cut into consecutive micro-batches.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        context_length: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ):
        if global_batch % world_size or global_batch // world_size % micro_batch:
            raise UserError(
                f"train.global_batch ({global_batch}) does not divide into {world_size} ranks "
                f"of whole micro-batches of {micro_batch}"
            )
        sources = [(source.shards, source.weight) for source in data.sources or []]
        if data.train is not None:
            sources = [(data.train, 1.0)]
        if not sources:
            raise UserError("data.train is required: the shards to train on")
        paths = [expand(shards, "data.train" if data.train else "data.sources") for shards, _ in sources]
        shards = Shards([path for group in paths for path in group], data)
        counts = _split(shards.counts, paths)
        if len(sources) == 1:
            self._order = StreamOrder(counts[0], seed, data.lanes, data.block)
        else:
            self._order = MixtureOrder(counts, [weight for _, weight in sources], seed, data.lanes, data.block)
        self._prefetch = None
        if any(is_remote(path) for path in shards.paths):
            _check_cache(data, shards)
            self._prefetch = Prefetch(shards.enter)
        self._reader = SampleReader(shards, data, tokenizer, image_size, context_length)
        self._pad_id, self._image_size, self._context_length = tokenizer.pad_id, image_size, context_length
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._workers = Workers(data.workers)
        self._slow_sample_s, self._allow_change, self._block = data.slow_sample_s, data.allow_change, data.block
        self.num_samples = self._order.num_samples
        self._shard_digests = [
            _digest(name, count, digest)
            for name, count, digest in zip(shards.names, shards.counts, shards.digests, strict=True)
        ]
        self._names = shards.names
        self.fingerprint = _digest(
            data.lanes, data.block, *[(weight, len(group)) for (_, weight), group in zip(sources, paths, strict=True)],
            *self._shard_digests,
        )  # fmt: skip

    def batches(self, samples: int) -> Iterator[list[Batch]]:
        """From the first position not yet consumed: for each global batch, this rank's micro-batches in order."""
        return self._workers.run(self._plan(first) for first in _count_from(samples, self._global_batch))

    def state(self, samples: int) -> dict:
        """What is needed to go on after `samples` consumed samples."""
        return {
            "samples": samples,
            "seed": self._seed,
            "fingerprint": self.fingerprint,
            "order_version": ORDER_VERSION,
            "shards": _summary(self._shard_digests),
        }

    def check_state(self, state: dict) -> None:
        """Raises UserError when a state does not continue on this stream, naming what differs."""
        if state["order_version"] != ORDER_VERSION:
            raise UserError(
                f"the checkpoint's data order is version {state['order_version']}, this program's is {ORDER_VERSION}: "
                "resume with the version of mmscale that wrote it"
            )
        if state["seed"] != self._seed:
            raise UserError(f"run.seed is {self._seed}, the checkpoint's is {state['seed']}: it may not change")
        if state["fingerprint"] != self.fingerprint:
            what = f"the training data has changed since the checkpoint: {self._difference(state)}"
            if not self._allow_change:
                raise UserError(f"{what}; data.allow_change=true goes on all the same")
            logger.warning("%s (data.allow_change)", what)

    def epoch(self, samples: int) -> float:
        """Passes over the data after `samples` samples."""
        return samples / self.num_samples

    def close(self) -> None:
        self._workers.close()
        if self._prefetch is not None:
            self._prefetch.close()
        self._reader.shards.close()

    def _difference(self, state: dict) -> str:
        before, now = state.get("shards", {}), _summary(self._shard_digests)
        if before.get("count") != now["count"]:
            return f"it had {before.get('count')} shards, now there are {now['count']}"
        for group, (old, new) in enumerate(zip(before["digests"], now["digests"], strict=True)):
            if old != new:
                names = self._names[group * now["group"] : (group + 1) * now["group"]]
                return f"shard {names[0]} differs" if len(names) == 1 else f"a shard of {names[0]}..{names[-1]} differs"
        return "data.lanes, data.block or the weights of data.sources differ"

    def _plan(self, first: int) -> "Plan[list[Batch]]":
        rows = range(first + self._rank, first + self._global_batch, self._world_size)
        builders = []
        for start in range(0, len(rows), self._micro_batch):
            positions = rows[start : start + self._micro_batch]
            places = [self._order.locate(position) for position in positions]
            if self._prefetch is not None:
                self._prefetch.want(place.shard for place in places)
                # The same lanes, one block further on.
                ahead = self._order.lanes * self._block
                self._prefetch.want(self._order.locate(position + ahead).shard for position in positions)
            builders.append(_Builder(positions, self._image_size, self._read_row, places, self._slow_sample_s))
        tasks = [task for builder in builders for task in builder.tasks()]
        return Plan(tasks, lambda: [builder.batch(self._pad_id, self._context_length) for builder in builders])

    def _read_row(self, builder: "_Builder", row: int, place: Place) -> None:
        shards = self._reader.shards
        position = builder.positions[row]
        name = shards.names[place.shard]
        try:
            key, ids = self._reader.train(place, self._seed, position, builder.pixels[row])
        except SampleError as error:
            key = shards.key(place.shard, place.sample)
            builder.bad[row] = BadSample(position, name, key, str(error))
        else:
            builder.ids[row] = ids
        builder.keys[row] = f"{name}/{key}"


class EvalSet:
    """A finite split: every sample once over all ranks, and the same number of batches on every rank.

    A rank whose share is shorter gets batches of one masked row (position -1) in the end. limit: only the first so many
    samples.
    """

    def __init__(
        self,
        shards: Paths,
        tokenizer: Tokenizer,
        *,
        data: DataConfig,
        image_size: int,
        context_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
    ):
        self._shards = Shards(expand(shards, "data.val"), data)
        counts = np.asarray(self._shards.counts, dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self.num_samples = int(counts.sum()) if limit is None else min(limit, int(counts.sum()))
        self._reader = SampleReader(self._shards, data, tokenizer, image_size, context_length)
        self._pad_id, self._image_size, self._context_length = tokenizer.pad_id, image_size, context_length
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._num_workers, self._slow_sample_s = data.workers, data.slow_sample_s

    def __len__(self) -> int:
        """Batches of every rank."""
        return -(-self.num_samples // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[EvalBatch]:
        workers = Workers(self._num_workers)
        try:
            yield from workers.run(self._plan(number) for number in range(len(self)))
        finally:
            workers.close()

    def _plan(self, number: int) -> "Plan[EvalBatch]":
        rows = range(self._rank, self.num_samples, self._world_size)
        positions = rows[number * self._batch_size : (number + 1) * self._batch_size] or [NO_POSITION]
        places = [self._locate(position) for position in positions]
        builder = _Builder(positions, self._image_size, self._read_row, places, self._slow_sample_s)
        return Plan(list(builder.tasks()), lambda: builder.eval_batch(self._pad_id, self._context_length))

    def _locate(self, position: int) -> Place:
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return Place(0, shard, position - int(self._starts[shard]))

    def _read_row(self, builder: "_Builder", row: int, place: Place) -> None:
        position = builder.positions[row]
        if position == NO_POSITION:
            return
        name = self._shards.names[place.shard]
        try:
            sample, ids = self._reader.evaluate(place.shard, place.sample, builder.pixels[row])
        except SampleError as error:
            key = self._shards.key(place.shard, place.sample)
            builder.bad[row] = BadSample(position, name, key, str(error))
        else:
            key = sample.key
            builder.ids[row] = ids
            builder.records[row] = sample.record
            builder.captions[row] = _all_captions(sample)
        builder.keys[row] = f"{name}/{key}"


@dataclass
class Plan:
    """A piece of work: tasks that may run in any order on any thread, and what to make of them when all are done."""

    tasks: list[Callable[[], None]]
    finish: Callable[[], object]


class Workers:
    """Runs plans in order: ahead of time on `num_threads` threads, or with 0 threads when they are asked for."""

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


class _Builder:
    """A batch in the making; threads fill its rows."""

    def __init__(
        self,
        positions: Sequence[int],
        image_size: int,
        read_row: Callable[["_Builder", int, Place], None],
        places: list[Place],
        slow_sample_s: float,
    ):
        self.positions = positions
        # Channels last, as the resize leaves them: a row is copied in one piece.
        self._pixels = _buffers.take(len(positions), image_size, image_size, 3)
        self.pixels = self._pixels.numpy()
        self.ids: list[list[int]] = [[] for _ in positions]
        self.keys = [""] * len(positions)
        self.bad: list[BadSample | None] = [None] * len(positions)
        self.records: list[dict] = [{} for _ in positions]
        self.captions: list[list[str]] = [[] for _ in positions]
        self._read_row, self._places, self._slow_sample_s = read_row, places, slow_sample_s

    def tasks(self) -> Iterator[Callable[[], None]]:
        for start in range(0, len(self.positions), ROWS_PER_TASK):
            yield lambda start=start: self._fill(start, min(start + ROWS_PER_TASK, len(self.positions)))

    def batch(self, pad_id: int, context_length: int) -> Batch:
        return Batch(**self._parts(pad_id, context_length))

    def eval_batch(self, pad_id: int, context_length: int) -> EvalBatch:
        return EvalBatch(**self._parts(pad_id, context_length), records=self.records, captions=self.captions)

    def _fill(self, start: int, stop: int) -> None:
        for row in range(start, stop):
            begun = time.monotonic()
            self._read_row(self, row, self._places[row])
            if not self.ids[row]:
                self.pixels[row] = 0
            if (took := time.monotonic() - begun) > self._slow_sample_s:
                logger.warning("%s took %.1f s to read", self.keys[row], took)

    def _parts(self, pad_id: int, context_length: int) -> dict:
        lengths = torch.tensor([len(ids) for ids in self.ids])
        input_ids = torch.full((len(self.ids), trimmed_length(int(lengths.max()), context_length)), pad_id)
        for row, ids in enumerate(self.ids):
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return {
            "pixel_values": self._pixels.permute(0, 3, 1, 2),
            "input_ids": input_ids,
            "lengths": lengths,
            "valid": lengths > 0,
            "positions": torch.tensor(list(self.positions)),
            "keys": self.keys,
            "bad": [bad for bad in self.bad if bad is not None],
        }


def trimmed_length(longest: int, context_length: int) -> int:
    """Columns for captions of up to `longest` tokens: a multiple of 8 with the CLS token, where the context allows."""
    return min(context_length, -(-(longest + 1) // 8) * 8 - 1)


def _all_captions(sample: RawSample) -> list[str]:
    texts = sample.record.get("captions")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    return [text for texts in sample.captions for text in texts]


def _count_from(first: int, step: int) -> Iterator[int]:
    while True:
        yield first
        first += step


def _split(counts: list[int], groups: list[list[str]]) -> list[list[int]]:
    ends = np.cumsum([len(group) for group in groups])
    return [counts[end - len(group) : end] for group, end in zip(groups, ends, strict=True)]


def _check_cache(data: DataConfig, shards: Shards) -> None:
    """A cache that cannot hold the shards in play would fetch them again and again. Raises UserError."""
    per_lane = math.ceil(data.block * len(shards.counts) / max(sum(shards.counts), 1)) + 1
    needed = min(data.lanes * per_lane * sum(shards.sizes) / len(shards.sizes), sum(shards.sizes))
    if data.cache_gib * 2**30 < needed:
        raise UserError(
            f"data.cache_gib: {data.cache_gib:g} GiB cannot hold the shards that are read at once (data.lanes "
            f"{data.lanes} x data.block {data.block} samples): {needed / 2**30:.2f} GiB are needed"
        )


def _digest(*parts: object) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _summary(digests: list[str]) -> dict:
    """At most 4,096 short digests of runs of shards: enough to say where a data set has changed."""
    group = -(-len(digests) // 4096)
    runs = [digests[start : start + group] for start in range(0, len(digests), group)]
    return {"count": len(digests), "group": group, "digests": [_digest(*run)[:8] for run in runs]}
