"""Which sample comes at position i: a pure function of (seed, i), for any number of ranks and workers.

An epoch's shards are permuted and joined; the whole is cut into lanes whose lengths differ by at most one; inside a
lane, blocks of samples are permuted. Position p of an epoch reads lane p % lanes at offset p // lanes. What is held is
one number a shard and the blocks last entered, never a table of the data set.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmscale.data.recent import Recent
from mmscale.errors import UserError

ORDER_VERSION = 1  # raise it with every change that moves a sample to another position

_SHARDS, _SAMPLES = 0, 1  # what a permutation is for: keeps their random streams apart


class Place(NamedTuple):
    """Where a position is read from; `epoch` counts the passes over the sample's own data set."""

    epoch: int
    shard: int
    sample: int


class StreamOrder:
    """The order of one data set.

    counts: samples of each shard. lanes: number of places that are read in turn. block: samples of a lane that are
    permuted together. About lanes x block samples are in play at any time.
    """

    order_version = ORDER_VERSION

    def __init__(self, counts: Sequence[int], seed: int, lanes: int = 64, block: int = 1024, stream: int = 0):
        self.counts = np.asarray(counts, dtype=np.int64)
        if self.counts.ndim != 1 or len(self.counts) == 0 or self.counts.min() < 0 or self.counts.sum() == 0:
            raise UserError("the shards hold no samples")
        self.num_samples = int(self.counts.sum())
        self.seed, self.lanes, self.block, self.stream = seed, lanes, block, stream
        self._epochs = Recent(3)
        self._blocks = Recent(2 * lanes + 16)

    def locate(self, position: int) -> Place:
        """The sample at stream position `position` >= 0."""
        epoch, within = divmod(position, self.num_samples)
        offset, lane = divmod(within, self.lanes)
        return self._read(epoch, lane, offset)

    def locate_in_lane(self, lane: int, turn: int) -> Place:
        """The sample that lane number `lane` reads on its turn number `turn`, when each lane has its own epochs."""
        epoch, offset = divmod(turn, self.lane_length(lane))
        return self._read(epoch, lane, offset)

    def lane_length(self, lane: int) -> int:
        return self.num_samples // self.lanes + (lane < self.num_samples % self.lanes)

    def _read(self, epoch: int, lane: int, offset: int) -> Place:
        number, within = divmod(offset, self.block)
        key = (epoch, lane, number)
        entered = self._blocks.get(key)
        if entered is None:
            entered = self._blocks.put(key, self._enter(epoch, lane, number))
        shards, samples = entered
        return Place(epoch, int(shards[within]), int(samples[within]))

    def _enter(self, epoch: int, lane: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, sample) of every offset in a block of a lane, in the order they are read."""
        shards, ends = self._epoch(epoch)
        base, extra = divmod(self.num_samples, self.lanes)
        start = lane * base + min(lane, extra) + number * self.block
        size = min(self.block, self.lane_length(lane) - number * self.block)
        numbers = start + _permutation(size, self.seed, self.stream, _SAMPLES, epoch, lane, number)
        slots = np.searchsorted(ends, numbers, side="right")
        chosen = shards[slots]
        samples = numbers - (ends[slots] - self.counts[chosen])
        return chosen.astype(np.int32), samples.astype(np.int32)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and where each ends in their concatenation."""
        found = self._epochs.get(epoch)
        if found is None:
            shards = _permutation(len(self.counts), self.seed, self.stream, _SHARDS, epoch).astype(np.int32)
            found = self._epochs.put(epoch, (shards, np.cumsum(self.counts[shards])))
        return found


class MixtureOrder:
    """The order of several data sets, in exact proportions.

    Over every PROPORTION_BLOCK positions each source has its exact share, and so it has in every lane over the same
    number of that lane's turns. Lane l of the mixture reads lane l of each source, and a source's lane begins its next
    epoch when it has been read: sources of very different sizes do not wait for each other.

    Both kinds of exactness come from a table of labels in which every block of positions and every lane column holds
    each label once; labels are then dealt to the sources.
    """

    order_version = ORDER_VERSION
    PROPORTION_BLOCK = 1000

    def __init__(
        self, sources: Sequence[Sequence[int]], weights: Sequence[float], seed: int, lanes: int = 64, block: int = 1024
    ):
        self.lanes = lanes
        self.orders = [StreamOrder(counts, seed, lanes, block, stream) for stream, counts in enumerate(sources, 1)]
        for number, order in enumerate(self.orders):
            if order.num_samples < lanes:
                raise UserError(
                    f"source {number} holds {order.num_samples} samples, fewer than data.lanes ({lanes}): "
                    f"set data.lanes to {order.num_samples} or less"
                )
        self.num_samples = sum(order.num_samples for order in self.orders)
        self.shares = _shares(weights, self.PROPORTION_BLOCK)
        self._first_shard = np.cumsum([0, *[len(order.counts) for order in self.orders]]).tolist()
        owner = np.repeat(np.arange(len(self.shares)), self.shares)
        owner = owner[_permutation(self.PROPORTION_BLOCK, seed, 0, _SHARDS, 0)]
        self._period = self.PROPORTION_BLOCK * lanes
        source = owner[label_table(self.PROPORTION_BLOCK, lanes)]
        # The turn of each entry among those of its lane and source.
        turn = np.empty(self._period, dtype=np.int64)
        for lane in range(lanes):
            column = source[lane::lanes]
            for number in range(len(self.shares)):
                turn[lane::lanes][column == number] = np.arange(self.shares[number])
        self._source, self._turn = source.astype(np.int16), turn.astype(np.int16)

    def locate(self, position: int) -> Place:
        """The sample at stream position `position`; shards are numbered through all sources."""
        period, entry = divmod(position, self._period)
        number = int(self._source[entry])
        turn = self.shares[number] * period + int(self._turn[entry])
        place = self.orders[number].locate_in_lane(position % self.lanes, turn)
        return place._replace(shard=place.shard + self._first_shard[number])


def label_table(block: int, lanes: int) -> np.ndarray:
    """Labels 0..block-1 for block x lanes positions: [block * lanes], int64.

    Every block of `block` positions, and every lane's column (the entries l, l + lanes, ...), holds each label once.
    Whole rows of a block are Latin squares shifted by the block's number; the rest of a block, which begins in
    another lane each time, is filled through the residues modulo gcd(block, lanes).
    """
    position = np.arange(block * lanes, dtype=np.int64)
    number, within, lane = position // block, position % block, position % lanes
    row, rows, rest = within // lanes, block // lanes, block % lanes
    label = lanes * row + (lane + number) % lanes
    if rest:
        common = np.gcd(rest, lanes)
        cycle = lanes // common
        x, y = np.divmod(lane, common)
        value = (x - (rest // common) * (number % cycle)) % cycle
        last = lanes * rows + common * value + (y + (number // cycle) % common) % common
        label = np.where(row == rows, last, label)
    return label


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares that sum to `total`, by largest remainder."""
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    shares = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - shares), kind="stable")[: total - shares.sum()]
    shares[largest] += 1
    if shares.min() == 0:
        number = int(shares.argmin())
        raise UserError(f"data.sources: source {number} weighs less than 1/{total} of all; leave it out or raise it")
    return shares.tolist()


def _permutation(size: int, seed: int, *purpose: int) -> np.ndarray:
    """A permutation of range(size), int64, from Philox's raw words: these are the same in every version of NumPy."""
    if len(purpose) > 5:
        raise AssertionError("a purpose is at most five numbers")
    stream, kind, *counter = purpose
    key = np.array([seed, stream << 8 | kind], dtype=np.uint64)
    counter = np.array([0, *counter, *[0] * (3 - len(counter))], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(size), kind="stable")
