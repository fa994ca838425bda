"""What is in the data: every sample is read, decoded and noted."""

import base64
import hashlib
import io
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from PIL import Image

from mmscale.config import DataConfig
from mmscale.data import images
from mmscale.data.captions import SampleError
from mmscale.data.progress import track
from mmscale.data.shards import Shards
from mmscale.data.tokenizer import Tokenizer

THUMBNAIL = 112
PERCENTILES = (0, 5, 50, 95, 100)


@dataclass
class Thumbnail:
    """A sample on the contact sheet; `jpeg` is base64."""

    key: str
    caption: str
    jpeg: str


@dataclass
class Sample:
    """What is noted of one sample; a broken one has only key and reason."""

    key: str
    reason: str | None = None
    image_format: str = ""
    width: int = 0
    height: int = 0
    num_bytes: int = 0
    caption_length: int = 0
    image_hash: bytes = b""
    caption_hash: bytes = b""


@dataclass
class Findings:
    """The outcome of an inspection; `values` holds one number a sample and property."""

    num_shards: int
    num_samples: int
    num_bytes: int
    num_read: int = 0
    length_unit: str = "words"
    shard_sizes: list[int] = field(default_factory=list)
    formats: Counter = field(default_factory=Counter)
    values: dict[str, list[float]] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)
    same_image: list[tuple[int, str]] = field(default_factory=list)
    same_caption: list[tuple[int, str]] = field(default_factory=list)
    thumbnails: list[Thumbnail] = field(default_factory=list)

    def percentiles(self, name: str) -> list[float]:
        return np.percentile(self.values[name], PERCENTILES).tolist() if self.values.get(name) else []

    def duplicates(self, groups: list[tuple[int, str]]) -> int:
        """Samples beyond the first of each group of equals."""
        return sum(count - 1 for count, _ in groups)


def examine(
    shards: Shards, data: DataConfig, tokenizer: Tokenizer | None, limit: int | None, contact_sheet: int, threads: int
) -> Findings:
    """Looks at every sample once."""
    findings = Findings(len(shards.counts), sum(shards.counts), sum(shards.sizes))
    findings.length_unit = "tokens" if tokenizer else "words"
    findings.shard_sizes = list(shards.counts)
    places = [(shard, number) for shard, count in enumerate(shards.counts) for number in range(count)][:limit]
    length = f"caption {findings.length_unit}"
    names = {"width": "width", "height": "height", "num_bytes": "image bytes", "caption_length": length}
    findings.values = {label: [] for label in [*names.values(), "aspect"]}
    image_hashes, caption_hashes = _Groups(), _Groups()
    for sample in _noted(shards, data, tokenizer, places, threads):
        findings.num_read += 1
        if sample.reason is not None:
            findings.broken.append((sample.key, sample.reason))
            continue
        findings.formats[sample.image_format] += 1
        for name, label in names.items():
            findings.values[label].append(getattr(sample, name))
        findings.values["aspect"].append(sample.width / sample.height)
        image_hashes.add(sample.image_hash, sample.key)
        caption_hashes.add(sample.caption_hash, sample.key)
    findings.same_image, findings.same_caption = image_hashes.groups(), caption_hashes.groups()
    findings.thumbnails = _contact_sheet(shards, data, places, contact_sheet)
    return findings


class _Groups:
    """Counts equal things by an 8-byte hash."""

    def __init__(self):
        self._counts: dict[bytes, int] = {}
        self._first: dict[bytes, str] = {}

    def add(self, digest: bytes, key: str) -> None:
        self._counts[digest] = self._counts.get(digest, 0) + 1
        self._first.setdefault(digest, key)

    def groups(self) -> list[tuple[int, str]]:
        """(how many are equal, the key of the first), largest first."""
        groups = [(count, self._first[digest]) for digest, count in self._counts.items() if count > 1]
        return sorted(groups, key=lambda group: (-group[0], group[1]))


def _noted(
    shards: Shards, data: DataConfig, tokenizer: Tokenizer | None, places: list[tuple[int, int]], threads: int
) -> Iterator[Sample]:
    """What is noted of each place, in order; a bounded number is read ahead."""
    ahead: deque = deque()
    upcoming = iter(places)
    with ThreadPoolExecutor(threads) as pool:
        for _ in track(range(len(places)), len(places), "reading samples"):
            for place in islice(upcoming, 8 * threads - len(ahead)):
                ahead.append(pool.submit(_note, shards, data, tokenizer, *place))
            yield ahead.popleft().result()


def _note(shards: Shards, data: DataConfig, tokenizer: Tokenizer | None, shard: int, number: int) -> Sample:
    name = shards.names[shard]
    try:
        raw = shards.read(shard, number)
        pixels = images.decode(raw.image, data.max_pixels)
    except (SampleError, images.ImageError) as error:
        return Sample(f"{name}/{shards.key(shard, number)}", str(error))
    caption = raw.captions[0][0]
    with Image.open(io.BytesIO(raw.image)) as header:
        image_format = f"{header.format} {header.mode}"
    return Sample(
        key=f"{name}/{raw.key}",
        image_format=image_format,
        width=pixels.shape[1],
        height=pixels.shape[0],
        num_bytes=len(raw.image),
        caption_length=len(tokenizer.encode(caption, 1 << 20)) if tokenizer else len(caption.split()),
        image_hash=hashlib.blake2b(raw.image, digest_size=8).digest(),
        caption_hash=hashlib.blake2b(caption.encode(), digest_size=8).digest(),
    )


def _contact_sheet(shards: Shards, data: DataConfig, places: list[tuple[int, int]], size: int) -> list[Thumbnail]:
    """Samples spread evenly over the data."""
    found = []
    for step in range(min(size, len(places))):
        shard, number = places[step * len(places) // min(size, len(places))]
        try:
            raw = shards.read(shard, number)
            pixels = images.decode(raw.image, data.max_pixels)
        except (SampleError, images.ImageError):
            continue
        scale = THUMBNAIL / max(pixels.shape[:2])
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(images.resize(pixels, height, width))).save(file, "JPEG", quality=80)
        encoded = base64.b64encode(file.getvalue()).decode()
        found.append(Thumbnail(f"{shards.names[shard]}/{raw.key}", raw.captions[0][0], encoded))
    return found
