"""Few labelled examples of each class, drawn once, and the stream that a run reads them from."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.prompts.classes import Classes
from mmscale.adapt.prompts.pictures import Pictures, encode_pixels
from mmscale.data.batches import BatchBuilder, LabelledBatch, Row
from mmscale.data.captions import SampleError
from mmscale.data.samples import SampleReader, all_captions
from mmscale.data.shards import Shards
from mmscale.data.sources import train_shards
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.model.modeling_mmscale import MMScaleModel


@dataclass
class Shot:
    """One decoded example: pixels uint8 [size, size, 3], and its row of a batch."""

    pixels: np.ndarray
    row: Row

    @property
    def key(self) -> str:
        """As in a batch."""
        return f"{self.row.shard}/{self.row.key}"


def draw_shots(
    config: AdaptConfig, tokenizer: Tokenizer, classes: Classes, image_size: int, context_length: int
) -> list[Shot]:
    """`adapt.prompts.shots` examples of every class from data.train, as evaluation sees them; `run.seed` says which.

    Raises UserError when a class has too few.
    """
    data, shots = config.data, config.adapt.prompts.shots
    paths = [path for group in train_shards(data)[0] for path in group]
    shards = Shards(paths, data)
    places: list[list[tuple[int, int]]] = [[] for _ in classes.names]
    for shard, count in enumerate(shards.counts):
        for number in range(count):
            try:
                record = shards.read(shard, number, with_record=True, with_image=False).record
            except SampleError:
                continue
            if (own := classes.of(record)) >= 0:
                places[own].append((shard, number))
    reader = SampleReader(data, tokenizer, image_size, context_length)
    drawn = []
    for number, (name, of_class) in enumerate(zip(classes.names, places, strict=True)):
        order = np.random.default_rng([config.run.seed, number]).permutation(len(of_class))
        found = []
        for index in order:
            if len(found) == shots:
                break
            found += _read(shards, reader, *of_class[index], image_size)
        if len(found) < shots:
            raise UserError(
                f"adapt.prompts.shots: {shots} asked for, but data.train has {len(found)} usable pictures of `{name}`"
            )
        drawn += found
    shards.close()
    return drawn


def encode_shots(model: MMScaleModel, shots: list[Shot], classes: Classes) -> Pictures:
    """The examples through the image tower."""
    pixels = torch.from_numpy(np.stack([shot.pixels for shot in shots])).permute(0, 3, 1, 2)
    encoded = encode_pixels(model, pixels, tokens=False)
    encoded.targets = classes.targets([shot.row.record for shot in shots])
    return encoded


def _read(shards: Shards, reader: SampleReader, shard: int, number: int, image_size: int) -> list[Shot]:
    pixels = np.empty((image_size, image_size, 3), dtype=np.uint8)
    try:
        raw = shards.read(shard, number, with_record=True)
        ids = reader.evaluate(raw, pixels)
    except SampleError:
        return []
    return [Shot(pixels, Row(shards.names[shard], raw.key, ids, record=raw.record, captions=all_captions(raw)))]


class ShotStream:
    """An endless stream over few examples held in memory, with the methods of a `TrainStream`.

    Position p of the stream is entry p % n of a permutation keyed by (seed, p // n): its state is a number of samples.
    """

    def __init__(
        self,
        shots: list[Shot],
        *,
        pad_id: int,
        context_length: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ):
        self._shots, self._pad_id, self._context_length, self._seed = shots, pad_id, context_length, seed
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._rank, self._world_size = rank, world_size
        self.num_samples = len(shots)
        keys = json.dumps([shot.key for shot in shots])
        self.fingerprint = hashlib.sha256(keys.encode()).hexdigest()

    def batches(self, samples: int) -> Iterator[list[LabelledBatch]]:
        """As `TrainStream.batches`."""
        for first in itertools.count(samples, self._global_batch):
            rows = range(first + self._rank, first + self._global_batch, self._world_size)
            yield [
                self._batch(rows[start : start + self._micro_batch]) for start in range(0, len(rows), self._micro_batch)
            ]

    def state(self, samples: int) -> dict:
        return {"samples": samples, "seed": self._seed, "fingerprint": self.fingerprint}

    def check_state(self, state: dict) -> None:
        """Raises UserError when a checkpoint was made with other examples."""
        if (state["seed"], state["fingerprint"]) != (self._seed, self.fingerprint):
            raise UserError("the examples drawn are not those of the checkpoint: run.seed, data.train, shots or label")

    def epoch(self, samples: int) -> float:
        return samples / self.num_samples

    def close(self) -> None:
        pass

    def _batch(self, positions: range) -> LabelledBatch:
        size = self._shots[0].pixels.shape[0]
        builder = BatchBuilder(self._read, [self._place(p) for p in positions], positions, size, slow_sample_s=60.0)
        for task in builder.tasks():
            task()
        return builder.labelled_batch(self._pad_id, self._context_length)

    def _place(self, position: int) -> int:
        epoch, entry = divmod(position, self.num_samples)
        return int(_order(self._seed, epoch, self.num_samples)[entry])

    def _read(self, place: int, position: int, out: np.ndarray) -> Row:
        shot = self._shots[place]
        out[:] = shot.pixels
        return shot.row


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)
