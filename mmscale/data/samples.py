"""One sample: from its place in the shards to pixels and token ids, or to the reason why it cannot be used."""

import hashlib
import json
import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmscale.config import DataConfig, Paths
from mmscale.data import images
from mmscale.data.index import ShardIndex, load_index
from mmscale.data.order import Place
from mmscale.data.paths import expand, shard_name
from mmscale.data.store import LocalStore
from mmscale.data.tar import BLOCK, header_name, split_name
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError

logger = logging.getLogger(__name__)

MAX_GAP = 64 * 1024  # members that lie this close together are read at once


class SampleError(Exception):
    """A sample that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class BadSample:
    """A slot of a batch that is masked, and why."""

    position: int
    shard: str
    key: str
    reason: str


@dataclass
class RawSample:
    """A sample's encoded parts."""

    key: str
    image: bytes
    captions: list[list[str]]  # of each text field that the sample has, its texts
    record: dict


class Shards:
    """The shards of a data set with their indexes: sample `number` of shard `shard`, in bytes."""

    def __init__(self, shards: Sequence[str], data: DataConfig):
        self.paths = list(shards)
        self.names = [shard_name(path) for path in self.paths]
        self._image_kinds = [kind.strip().lower() for kind in data.image_key.split(";")]
        self._text_fields = [
            _TextField(key) for key in ([data.text_key] if isinstance(data.text_key, str) else data.text_key)
        ]
        self._indexes = [load_index(path, data.index_dir) for path in self.paths]
        for path, index in zip(self.paths, self._indexes, strict=True):
            if not index.has_any(self._image_kinds):
                found = ", ".join(index.kinds) or "none"
                raise UserError(f"{path}: holds no images ({data.image_key}); member kinds found: {found}")
        self._store = LocalStore()

    @property
    def counts(self) -> list[int]:
        return [len(index) for index in self._indexes]

    @property
    def digests(self) -> list[str]:
        return [index.digest for index in self._indexes]

    def read(self, shard: int, number: int, *, with_record: bool = False, with_image: bool = True) -> RawSample:
        """The encoded parts of a sample. Raises SampleError."""
        members = self._indexes[shard].members(number)
        image_kind = next((kind for kind in self._image_kinds if kind in members), None)
        wanted = {image_kind} if with_image and image_kind else set()
        for field in self._text_fields:
            wanted |= field.kinds & members.keys()
        if with_record and "json" in members:
            wanted.add("json")
        key, parts = self._read_members(shard, number, {kind: members[kind] for kind in wanted})
        if with_image and image_kind is None:
            raise SampleError("the sample has no image")
        record = _json_object(parts["json"]) if "json" in parts else {}
        captions = [texts for field in self._text_fields if (texts := field.texts(parts, record))]
        if not captions:
            raise SampleError("the sample has no caption")
        return RawSample(key, parts.get(image_kind, b""), captions, record)

    def key(self, shard: int, number: int) -> str:
        """The key of a sample, "?" when its shard can no longer be read."""
        members = self._indexes[shard].members(number)
        try:
            return self._read_members(shard, number, dict(list(members.items())[:1]))[0]
        except SampleError:
            return "?"

    def _read_members(
        self, shard: int, number: int, wanted: dict[str, tuple[int, int]]
    ) -> tuple[str, dict[str, bytes]]:
        """(key, kind -> bytes). Each member is read together with the header before it, which must name the sample."""
        if not wanted:
            return self.key(shard, number), {}
        index: ShardIndex = self._indexes[shard]
        path = self.paths[shard]
        begin = min(offset for offset, _ in wanted.values()) - BLOCK
        end = max(offset + size for offset, size in wanted.values())
        parts, keys = {}, set()
        try:
            together = end - begin <= sum(size for _, size in wanted.values()) + MAX_GAP
            whole = self._store.read(path, begin, end - begin) if together else b""
            for kind, (offset, size) in wanted.items():
                if together:
                    at = offset - begin
                    block, data = whole[at - BLOCK : at], whole[at : at + size]
                else:
                    data = self._store.read(path, offset - BLOCK, BLOCK + size)
                    block, data = data[:BLOCK], data[BLOCK:]
                if len(data) < size:
                    raise SampleError("the shard has become shorter since it was indexed")
                parts[kind] = data
                named = split_name(header_name(block))
                keys.add(named[0] if named else "")
        except OSError as error:
            raise SampleError(f"the shard cannot be read: {error.strerror}") from None
        key = index.long_keys.get(number)
        if key is None:
            key = keys.pop()
            if keys or not key:
                raise SampleError("the shard has changed since it was indexed")
        return key, parts


class SampleReader:
    """Samples ready for a batch, the same whoever reads them: what is drawn at random is keyed by (seed, position)."""

    def __init__(self, shards: Shards, data: DataConfig, tokenizer: Tokenizer, image_size: int, context_length: int):
        self.shards = shards
        self._data = data
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._context_length = context_length

    def train(self, place: Place, seed: int, position: int, out: np.ndarray) -> tuple[str, list[int]]:
        """Writes the augmented picture to `out` [size, size, 3]; returns key and token ids. Raises SampleError."""
        raw = self.shards.read(place.shard, place.sample)
        draws = uniform_draws(seed, position)
        size = self._image_size
        pixels = self._decode(raw.image, None if self._data.decode == "exact" else self._fast_size())
        box = images.training_crop(*pixels.shape[:2], self._data.crop_scale, self._data.crop_ratio, draws)
        mode = "bicubic" if self._data.decode == "exact" else "bilinear"
        view = images.crop_and_resize(pixels, box, size, mode)
        out[:] = view[:, ::-1] if self._data.flip and draws[10] < 0.5 else view
        texts = raw.captions[int(draws[11] * len(raw.captions))]
        return raw.key, self._tokenizer.encode(texts[int(draws[12] * len(texts))], self._context_length)

    def evaluate(self, shard: int, number: int, out: np.ndarray) -> tuple[RawSample, list[int]]:
        """Writes the picture, as evaluation sees it, to `out`; returns the sample and its first caption's ids."""
        raw = self.shards.read(shard, number, with_record=True)
        out[:] = images.center_view(self._decode(raw.image, None), self._image_size)
        return raw, self._tokenizer.encode(raw.captions[0][0], self._context_length)

    def _fast_size(self) -> int:
        return self._image_size * 3 // 4

    def _decode(self, data: bytes, min_size: int | None) -> np.ndarray:
        try:
            return images.decode(data, self._data.max_pixels, min_size)
        except images.ImageError as error:
            raise SampleError(str(error)) from None


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


class _TextField:
    """One entry of data.text_key: `txt`, alternatives such as `txt;caption`, or a field of the JSON, `json.caption`."""

    def __init__(self, key: str):
        self._keys = [part.strip() for part in key.split(";")]
        self.kinds = {"json" if part.startswith("json.") else part.lower() for part in self._keys}

    def texts(self, parts: dict[str, bytes], record: dict) -> list[str]:
        """The sample's texts of this field, none when it lacks it. Raises SampleError for text that is unusable."""
        for key in self._keys:
            if key.startswith("json."):
                value = record
                for name in key.split(".")[1:]:
                    value = value.get(name) if isinstance(value, dict) else None
                texts = value if isinstance(value, list) else [value]
                found = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
            elif key.lower() in parts:
                found = [_caption(parts[key.lower()])]
            else:
                found = []
            if found:
                for text in found:
                    _check_caption(text)
                return found
        return []


MAX_CAPTION_BYTES = 32 * 1024


def _caption(data: bytes) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise SampleError(f"the caption has {len(data):,} bytes, more than {MAX_CAPTION_BYTES:,}")
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise SampleError("the caption is not UTF-8") from None
    if not text:
        raise SampleError("the caption is empty")
    return text


def _check_caption(text: str) -> None:
    if len(text) > MAX_CAPTION_BYTES:
        raise SampleError(f"the caption has {len(text):,} characters, more than {MAX_CAPTION_BYTES:,}")


def _json_object(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise SampleError("the .json member is not JSON") from None
    return value if isinstance(value, dict) else {}
