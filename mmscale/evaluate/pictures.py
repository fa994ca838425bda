"""Pictures that a user points at: files, folders, URLs and shards, under the evaluation transform."""

import logging
import urllib.error
import urllib.request
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path

import torch
from torch import Tensor

from mmscale.config import Paths
from mmscale.data import images
from mmscale.data.captions import SampleError
from mmscale.data.paths import expand
from mmscale.data.shards import Shards
from mmscale.errors import UserError
from mmscale.evaluate.splits import WHOLE, open_split
from mmscale.pretrained import Pretrained

logger = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}
MAX_DOWNLOAD_BYTES = 64 * 1024 * 1024
TIMEOUT_S = 30


@dataclass
class Picture:
    """One picture.

    Attributes:
        name: its path, its URL, or shard and key.
        pixels: `[3, size, size]`, uint8, as the model sees it.
        captions: what people wrote for it; empty unless it comes from a shard.
        source: the file, the URL or the shards that it comes from.
        place: its number among the samples of these shards; None outside of them.
    """

    name: str
    pixels: Tensor
    captions: list[str] = field(default_factory=list)
    source: str = ""
    place: int | None = None


def read_pictures(sources: Sequence[str], pretrained: Pretrained, limit: int | None = None) -> Iterator[Picture]:
    """The pictures of all sources, in order; of a folder by name, its folders included.

    A picture in a folder or a shard that cannot be decoded is logged and left out.

    Args:
        sources: image files, folders of them, `http(s)` URLs of images, and `.tar` shards (globs and braces too).
        limit: only the first so many.

    Raises:
        UserError: a source that is not there, or a picture named by the user that cannot be decoded.
    """
    found = (picture for source in sources for picture in _read_source(str(source), pretrained))
    return islice(found, limit)


def read_again(source: str, place: int | None, pretrained: Pretrained) -> Picture:
    """One picture by its `source` and `place`, without reading those before it."""
    if place is None:
        return next(_read_source(source, pretrained))
    return Picture(source, PlacedPictures(source, pretrained).read(place), source=source, place=place)


class PlacedPictures:
    """The pictures of shards by their number among all samples, as an `EvalSet` counts them."""

    def __init__(self, shards: Paths, pretrained: Pretrained):
        self._shards, self._pretrained = Shards(expand(shards), pretrained.data), pretrained
        self._ends = list(accumulate(self._shards.counts))

    def read(self, place: int) -> Tensor:
        """uint8 `[3, size, size]`. Raises UserError when the shards have changed and it is no longer there."""
        shard = bisect_right(self._ends, place)
        if shard == len(self._ends):
            raise UserError(f"sample {place} is not there: the shards have changed")
        number = place - (self._ends[shard - 1] if shard else 0)
        name = f"sample {place} of {self._shards.paths[shard]}"
        try:
            content = self._shards.read(shard, number).image
        except SampleError as error:
            raise UserError(f"{name}: {error}") from None
        return _decode(name, content, self._pretrained.image_size, self._pretrained.data.max_pixels).pixels


def is_shards(source: str) -> bool:
    """Whether a source is shards, rather than a picture or a folder of pictures."""
    bare = source.partition("?")[0]
    return bare.endswith(".tar") or bare.startswith("@") or (Path(bare).is_dir() and any(Path(bare).glob("*.tar")))


def batched(pictures: Iterator[Picture], size: int) -> Iterator[tuple[list[Picture], Tensor]]:
    """Pictures in lists of up to `size`, each with its `[batch, 3, height, width]` pixels."""
    while batch := list(islice(pictures, size)):
        yield batch, torch.stack([picture.pixels for picture in batch])


def _read_source(source: str, pretrained: Pretrained) -> Iterator[Picture]:
    size, max_pixels = pretrained.image_size, pretrained.data.max_pixels
    if is_shards(source):
        yield from _read_shards(source, pretrained)
    elif source.startswith(("http://", "https://")):
        yield _decode(source, _download(source), size, max_pixels)
    elif Path(source).is_dir():
        yield from _read_folder(Path(source), size, max_pixels)
    else:
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise UserError(f"{source}: cannot be read: {error.strerror}") from None
        yield _decode(source, content, size, max_pixels)


def _read_folder(folder: Path, size: int, max_pixels: int) -> Iterator[Picture]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: this folder holds no pictures ({', '.join(sorted(SUFFIXES))})")
    for path in paths:
        try:
            yield _decode(str(path), path.read_bytes(), size, max_pixels)
        except (UserError, OSError) as error:
            logger.warning("left out: %s", error)


def _read_shards(source: str, pretrained: Pretrained) -> Iterator[Picture]:
    eval_set = open_split(source, pretrained.model, pretrained.tokenizer, pretrained.data, batch_size=16, ranks=WHOLE)
    for batch in eval_set:
        for bad in batch.bad:
            logger.warning("left out: %s/%s: %s", bad.shard, bad.key, bad.reason)
        for row in batch.valid.nonzero().flatten().tolist():
            place = int(batch.positions[row])
            yield Picture(batch.keys[row], batch.pixel_values[row], batch.captions[row], source, place)


def _decode(name: str, content: bytes, size: int, max_pixels: int) -> Picture:
    try:
        view = images.center_view(images.decode(content, max_pixels), size)
    except images.ImageError as error:
        raise UserError(f"{name}: {error}") from None
    return Picture(name, torch.from_numpy(view.copy()).permute(2, 0, 1), source=name)


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "mmscale"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            content = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(f"{url}: cannot be downloaded: {error}") from None
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise UserError(f"{url}: larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB, not taken for a picture")
    return content
