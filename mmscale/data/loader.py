"""Batches of images and captions: the endless training stream, and finite sets for evaluation."""

import itertools
import logging
from collections.abc import Iterator

import numpy as np

from mmscale.config import DataConfig, Paths
from mmscale.data.batches import BadSample, Batch, BatchBuilder, EvalBatch, LabelledBatch, Plan, Row, Workers
from mmscale.data.captions import SampleError
from mmscale.data.order import ORDER_VERSION, Place
from mmscale.data.paths import expand
from mmscale.data.samples import SampleReader, all_captions
from mmscale.data.shards import Shards
from mmscale.data.sources import IndexedSource, Source
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError

__all__ = ["BadSample", "Batch", "EvalBatch", "EvalSet", "LabelledBatch", "TrainStream"]

logger = logging.getLogger(__name__)

NO_POSITION = -1


class TrainStream:
    """The endless stream of one rank's training batches; its whole state is the number of samples consumed.

    Global batch k holds the positions [k * global_batch, (k + 1) * global_batch); rank r of W takes every W-th of them,
    from the r-th on, cut into consecutive micro-batches. `labelled` batches carry each sample's JSON and captions.
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
        labelled: bool = False,
    ):
        if global_batch % world_size or global_batch // world_size % micro_batch:
            raise UserError(
                f"train.global_batch ({global_batch}) does not divide into {world_size} ranks "
                f"of whole micro-batches of {micro_batch}"
            )
        self._source: Source = _open_source(data, tokenizer, image_size, context_length, seed, rank, labelled)
        self._pad_id, self._image_size, self._context_length = tokenizer.pad_id, image_size, context_length
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._labelled, self._workers = labelled, Workers(data.workers)
        self._slow_sample_s, self._allow_change = data.slow_sample_s, data.allow_change
        self.num_samples = self._source.num_samples
        self.fingerprint = self._source.fingerprint

    def batches(self, samples: int) -> Iterator[list[Batch]]:
        """From the first position not yet consumed: for each global batch, this rank's micro-batches in order."""
        return self._workers.run(self._plan(first) for first in itertools.count(samples, self._global_batch))

    def state(self, samples: int) -> dict:
        """What is needed to go on after `samples` consumed samples."""
        return {
            "samples": samples,
            "seed": self._seed,
            "fingerprint": self.fingerprint,
            "order_version": ORDER_VERSION,
            "shards": self._source.summary,
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
            difference = self._source.difference(state.get("shards", {}))
            what = f"the training data has changed since the checkpoint: {difference}"
            if not self._allow_change:
                raise UserError(f"{what}; data.allow_change=true goes on all the same")
            logger.warning("%s (data.allow_change)", what)

    def epoch(self, samples: int) -> float:
        """Passes over the data after `samples` samples; 0 for a stream without end."""
        return samples / self.num_samples if self.num_samples else 0.0

    def close(self) -> None:
        self._source.close()
        self._workers.close()

    def _plan(self, first: int) -> Plan:
        rows = range(first + self._rank, first + self._global_batch, self._world_size)
        builders = [
            BatchBuilder(
                self._source.read, self._source.places(positions), positions, self._image_size, self._slow_sample_s
            )
            for start in range(0, len(rows), self._micro_batch)
            if (positions := rows[start : start + self._micro_batch])
        ]
        tasks = [task for builder in builders for task in builder.tasks()]
        finish = BatchBuilder.labelled_batch if self._labelled else BatchBuilder.batch
        return Plan(tasks, lambda: [finish(builder, self._pad_id, self._context_length) for builder in builders])


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
        self._reader = SampleReader(data, tokenizer, image_size, context_length)
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

    def _plan(self, number: int) -> Plan:
        rows = range(self._rank, self.num_samples, self._world_size)
        positions = rows[number * self._batch_size : (number + 1) * self._batch_size] or [NO_POSITION]
        places = [self._locate(position) for position in positions]
        builder = BatchBuilder(self._read, places, positions, self._image_size, self._slow_sample_s)
        return Plan(list(builder.tasks()), lambda: builder.eval_batch(self._pad_id, self._context_length))

    def _locate(self, position: int) -> Place:
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return Place(0, shard, position - int(self._starts[shard]))

    def _read(self, place: Place, position: int, out: np.ndarray) -> Row:
        if position == NO_POSITION:
            return Row()
        name = self._shards.names[place.shard]
        try:
            raw = self._shards.read(place.shard, place.sample, with_record=True)
            ids = self._reader.evaluate(raw, out)
        except SampleError as error:
            return Row(name, self._shards.key(place.shard, place.sample), reason=str(error))
        return Row(name, raw.key, ids, record=raw.record, captions=all_captions(raw))


def _open_source(
    data: DataConfig, tokenizer: Tokenizer, image_size: int, context_length: int, seed: int, rank: int, labelled: bool
) -> Source:
    if data.mode == "index":
        return IndexedSource(data, tokenizer, image_size, context_length, seed, labelled)
    if labelled:
        raise UserError("data.mode: stream gives pictures and captions only, no labels; take index")
    from mmscale.data.endless import EndlessSource

    return EndlessSource(data, tokenizer, image_size, context_length, seed, rank)
