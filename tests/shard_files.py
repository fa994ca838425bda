"""Shards for the tests of the stream: small pictures that say which sample they belong to."""

import functools
import io
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from mmscale.data.tokenizer import Tokenizer, train_tokenizer

WORDS = ("red", "green", "blue", "cat", "dog", "house", "tree", "car", "boat", "moon")


def picture(number: int, width: int = 40, height: int = 32, kind: str = "JPEG") -> bytes:
    """A smooth random picture, another for every number; its comment names the number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90, "comment": mark(number)} if kind == "JPEG" else {}))
    return file.getvalue()


def bomb(kind: str, side: int = 50_000) -> bytes:
    """A picture whose header promises side x side pixels."""
    data = picture(1, 16, 16, kind)
    if kind == "PNG":
        header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


def mark(number: int) -> bytes:
    return b" ".join([b"<%06d>" % number] * 3)


def caption(number: int) -> str:
    words = " ".join(WORDS[int(digit)] for digit in str(number))
    return f"{mark(number).decode()} a picture of {words}"


def sample(number: int, json: bool = False) -> dict[str, bytes]:
    parts = {"jpg": picture(number), "txt": caption(number).encode()}
    return parts | ({"json": b'{"number": %d}' % number} if json else {})


def write_shard(
    path: Path, samples: dict[str, dict[str, bytes]] | range, tar_format: int = tarfile.USTAR_FORMAT, json: bool = False
) -> Path:
    """samples: key -> kind -> bytes, or a range of sample numbers."""
    if isinstance(samples, range):
        samples = {f"{number:06d}": sample(number, json) for number in samples}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for key, parts in samples.items():
            for kind, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: list[int], name: str = "train") -> list[str]:
    """Shards with these many samples, numbered through."""
    first, paths = 0, []
    for shard, count in enumerate(counts):
        paths.append(str(write_shard(folder / f"{name}-{shard:05d}.tar", range(first, first + count))))
        first += count
    return paths


@functools.cache
def tokenizer() -> Tokenizer:
    folder = tempfile.mkdtemp()
    return train_tokenizer((caption(number) for number in range(400)), f"{folder}/tokenizer.model", 320)
