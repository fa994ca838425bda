"""Where training rows come from: shards with an index, any sample of which can be read at once."""

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mmscale.config import DataConfig
from mmscale.data.batches import Row
from mmscale.data.captions import SampleError
from mmscale.data.order import MixtureOrder, Place, StreamOrder
from mmscale.data.paths import expand, is_remote
from mmscale.data.prefetch import Prefetch
from mmscale.data.samples import SampleReader, all_captions
from mmscale.data.shards import Shards
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError


class Source(Protocol):
    """What a training stream reads from.

    num_samples: of an epoch, 0 where there is no such thing. fingerprint: changes with whatever would change the
    samples at a position. summary: of the data, for a checkpoint, small and JSON.
    """

    num_samples: int
    fingerprint: str
    summary: dict

    def places(self, positions: Sequence[int]) -> list:
        """Where the rows at these positions are read from; called in order, from one thread."""

    def read(self, place: object, position: int, out: np.ndarray) -> Row:
        """Reads a row and writes its pixels to `out`; called from many threads."""

    def difference(self, summary: dict) -> str:
        """In words, how the data differs from that of an earlier summary."""

    def close(self) -> None: ...


class IndexedSource:
    """Indexed shards, of one data set or several: the row at a position is a function of (seed, position)."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        image_size: int,
        context_length: int,
        seed: int,
        labelled: bool = False,
    ):
        groups, weights = train_shards(data)
        shards = Shards([path for group in groups for path in group], data)
        count_of = dict(zip(shards.paths, shards.counts, strict=True))
        counts = [[count_of[path] for path in group if path in count_of] for group in groups]
        if len(groups) == 1:
            self._order = StreamOrder(counts[0], seed, data.lanes, data.block)
        else:
            self._order = MixtureOrder(counts, weights, seed, data.lanes, data.block)
        self._prefetch = None
        if any(is_remote(path) for path in shards.paths):
            _check_cache(data, shards)
            self._prefetch = Prefetch(shards.enter)
        self._shards, self._seed, self._labelled = shards, seed, labelled
        self._source_of = [number for number, group in enumerate(counts) for _ in group]
        self._reader = SampleReader(data, tokenizer, image_size, context_length)
        self._in_play = data.lanes * data.block
        self.num_samples = self._order.num_samples
        digests = [
            digest_of(name, count, digest)
            for name, count, digest in zip(shards.names, shards.counts, shards.digests, strict=True)
        ]
        shape = [(weight, len(group)) for weight, group in zip(weights, counts, strict=True)]
        self.fingerprint = digest_of(data.lanes, data.block, *shape, *digests)
        self.summary = _summary(digests)

    def places(self, positions: Sequence[int]) -> list[Place]:
        places = [self._order.locate(position) for position in positions]
        if self._prefetch is not None:
            self._prefetch.want(place.shard for place in places)
            # The same lanes, one block further on.
            self._prefetch.want(self._order.locate(position + self._in_play).shard for position in positions)
        return places

    def read(self, place: Place, position: int, out: np.ndarray) -> Row:
        name = self._shards.names[place.shard]
        try:
            raw = self._shards.read(place.shard, place.sample, with_record=self._labelled)
            ids = self._reader.train(raw, self._seed, position, out)
        except SampleError as error:
            return Row(name, self._shards.key(place.shard, place.sample), reason=str(error))
        if not self._labelled:
            return Row(name, raw.key, ids)
        source = self._source_of[place.shard]
        return Row(name, raw.key, ids, record=raw.record, captions=all_captions(raw), source=source)

    def difference(self, summary: dict) -> str:
        now = self.summary
        if summary.get("count") != now["count"]:
            return f"it had {summary.get('count')} shards, now there are {now['count']}"
        for group, (old, new) in enumerate(zip(summary["digests"], now["digests"], strict=True)):
            if old != new:
                names = self._shards.names[group * now["group"] : (group + 1) * now["group"]]
                return f"shard {names[0]} differs" if len(names) == 1 else f"a shard of {names[0]}..{names[-1]} differs"
        return "data.lanes, data.block or the weights of data.sources differ"

    def close(self) -> None:
        if self._prefetch is not None:
            self._prefetch.close()
        self._shards.close()


def train_shards(data: DataConfig, pipes: bool = False) -> tuple[list[list[str]], list[float]]:
    """The shards of each training source, and the sources' weights. Raises UserError."""
    if data.train is not None:
        return [expand(data.train, "data.train", pipes)], [1.0]
    if not data.sources:
        raise UserError("data.train is required: the shards to train on")
    groups = [expand(source.shards, "data.sources", pipes) for source in data.sources]
    seen: set[str] = set()
    for group in groups:
        if both := seen & set(group):
            raise UserError(f"data.sources: {min(both)} is in two sources")
        seen |= set(group)
    return groups, [source.weight for source in data.sources]


def digest_of(*parts: object) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _summary(digests: list[str]) -> dict:
    """At most 4,096 short digests of runs of shards: enough to say where a data set has changed."""
    group = -(-len(digests) // 4096)
    runs = [digests[start : start + group] for start in range(0, len(digests), group)]
    return {"count": len(digests), "group": group, "digests": [digest_of(*run)[:8] for run in runs]}


def _check_cache(data: DataConfig, shards: Shards) -> None:
    """A cache that cannot hold the shards in play would fetch them again and again. Raises UserError."""
    per_lane = math.ceil(data.block * len(shards.counts) / max(sum(shards.counts), 1)) + 1
    needed = min(data.lanes * per_lane * sum(shards.sizes) / len(shards.sizes), sum(shards.sizes))
    if data.cache_gib * 2**30 < needed:
        raise UserError(
            f"data.cache_gib: {data.cache_gib:g} GiB cannot hold the shards that are read at once (data.lanes "
            f"{data.lanes} x data.block {data.block} samples): {needed / 2**30:.2f} GiB are needed"
        )
