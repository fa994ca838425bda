"""From a sample's encoded parts to pixels and token ids."""

import hashlib
import struct
from collections.abc import Iterator

import numpy as np

from mmscale.config import DataConfig, Paths
from mmscale.data import images
from mmscale.data.captions import SampleError
from mmscale.data.paths import expand
from mmscale.data.shards import RawSample, Shards
from mmscale.data.tokenizer import Tokenizer


class SampleReader:
    """Samples ready for a batch, the same whoever reads them: what is drawn at random is keyed by (seed, position)."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, image_size: int, context_length: int):
        self._data = data
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._context_length = context_length

    def train(self, raw: RawSample, seed: int, position: int, out: np.ndarray) -> list[int]:
        """Writes the augmented picture to `out` [size, size, 3]; returns the caption's ids. Raises SampleError."""
        draws = uniform_draws(seed, position)
        try:
            images.training_view(
                raw.image,
                lambda height, width: images.training_crop(
                    height, width, self._data.crop_scale, self._data.crop_ratio, draws
                ),
                self._image_size,
                self._data.max_pixels,
                fast=self._data.decode == "fast",
                out=out,
            )
        except images.ImageError as error:
            raise SampleError(str(error)) from None
        if self._data.flip and draws[10] < 0.5:
            out[:] = out[:, ::-1]
        texts = raw.captions[int(draws[11] * len(raw.captions))]
        return self._tokenizer.encode(texts[int(draws[12] * len(texts))], self._context_length)

    def evaluate(self, raw: RawSample, out: np.ndarray) -> list[int]:
        """Writes the picture, as evaluation sees it, to `out`; returns the first caption's ids. Raises SampleError."""
        try:
            pixels = images.decode(raw.image, self._data.max_pixels)
        except images.ImageError as error:
            raise SampleError(str(error)) from None
        out[:] = images.center_view(pixels, self._image_size)
        return self._tokenizer.encode(raw.captions[0][0], self._context_length)


def all_captions(sample: RawSample) -> list[str]:
    """Every caption of a sample: the `captions` of its JSON, where it has such a list, else the text fields'."""
    texts = sample.record.get("captions")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    return [text for texts in sample.captions for text in texts]


def uniform_draws(seed: int, position: int) -> list[float]:
    """Sixteen uniform numbers in [0, 1) that belong to a position of a run, from BLAKE2b."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=64).digest()
    return [word / 2**32 for word in struct.unpack("<16I", digest)]


def iter_captions(paths: Paths, data: DataConfig) -> Iterator[str]:
    """Every caption of the shards, in their order, all text fields of a sample; bad samples are left out."""
    shards = Shards(expand(paths), data)
    for shard, count in enumerate(shards.counts):
        for number in range(count):
            try:
                raw = shards.read(shard, number, with_image=False)
            except SampleError:
                continue
            for texts in raw.captions:
                yield from texts
