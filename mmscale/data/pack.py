"""`mmscale pack`: shards from a folder or a table, in parallel, the same bytes whoever makes them and however often.

Shard k holds the rows [k * shard_size, (k + 1) * shard_size) that are whole. It is written under a temporary name and
renamed, after its statistics, so that a call that was interrupted goes on with the shards that are not there yet.
"""

import io
import json
import multiprocessing
import os
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from mmscale.data import images
from mmscale.data.paths import is_remote
from mmscale.data.progress import track
from mmscale.data.remote import RemoteError, open_remote
from mmscale.data.tables import Row, read_rows
from mmscale.errors import UserError

MAX_BYTES = 1 << 28
MAX_PIXELS = 100_000_000
FETCHES = 16
TRIES = 3
RECIPE = "pack.json"
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Recipe:
    """Everything that the bytes of the shards depend on."""

    source: str
    source_bytes: int
    image: str
    text: str
    shard_size: int
    longest_side: int | None
    quality: int


class _BrokenRow(Exception):
    pass


def pack(
    source: str,
    out: str,
    *,
    image: str = "image",
    text: str = "text",
    shard_size: int = 1000,
    longest_side: int | None = None,
    quality: int = 90,
    processes: int | None = None,
) -> None:
    """Packs a folder of pictures with sidecar `.txt`/`.json`, or a CSV, TSV, JSONL or Parquet table, into shards.

    image, text: columns of a table; a picture is a path or a URL. longest_side: larger pictures are made smaller and
    encoded as JPEG of `quality`; without it pictures keep their bytes. Broken rows are listed in `NNNNN_stats.json` and
    left out. Raises UserError.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size: {shard_size} is not a number of samples")
    source_bytes = os.path.getsize(source) if os.path.isfile(source) else 0
    recipe = Recipe(
        os.path.basename(os.path.abspath(source)), source_bytes, image, text, shard_size, longest_side, quality
    )
    rows = read_rows(source, image, text)
    first = list(islice(rows, 1))  # a source that cannot be read leaves no folder behind
    folder = _open_folder(Path(out), recipe)
    rows = chain(first, rows)
    chunks = enumerate(iter(lambda: list(islice(rows, shard_size)), []))
    processes = processes or os.cpu_count() or 1
    totals = {"shards": 0, "successes": 0, "broken": 0}
    for number, stats in _in_order(partial(_pack_shard, folder, recipe), chunks, folder, processes):
        totals["shards"] = number + 1
        totals["successes"] += stats["successes"]
        totals["broken"] += len(stats["broken"])
        for broken in stats["broken"][:3]:
            print(f"  row {broken['row']} ({broken['image']}): {broken['reason']}")
        if len(stats["broken"]) > 3:
            print(f"  ... {len(stats['broken']) - 3} more are listed in {folder / _stats_name(number)}")
    counts = f"{totals['shards']:,} shards, {totals['successes']:,} samples, {totals['broken']:,} broken rows left out"
    print(f"{folder}: {counts}")
    if totals["successes"] == 0:
        raise UserError(f"{source}: not one row could be packed; see {folder / _stats_name(0)}")


def _open_folder(folder: Path, recipe: Recipe) -> Path:
    """A folder that is new, or was begun with the same recipe. Raises UserError."""
    wanted = json.dumps(asdict(recipe), indent=1) + "\n"
    recipe_file = folder / RECIPE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if recipe_file.exists():
            if recipe_file.read_text() != wanted:
                raise UserError(f"{folder} was packed from another source or with other options: give another folder")
        elif any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: give a new folder")
        temporary = folder / f".{RECIPE}.tmp"
        temporary.write_text(wanted)
        temporary.replace(recipe_file)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    return folder


def _in_order(
    task, chunks: Iterator[tuple[int, list[Row]]], folder: Path, processes: int
) -> Iterator[tuple[int, dict]]:
    """(shard number, statistics), in order; shards that are there already are not made again."""
    pending: deque[tuple[int, Future | dict]] = deque()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(processes, context) as pool:
        for number, rows in track(chunks, None, "packing shards"):
            done = _finished(folder, number)
            pending.append((number, done if done is not None else pool.submit(task, number, rows)))
            while len(pending) > 2 * processes:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())


def _result(number: int, outcome: Future | dict) -> tuple[int, dict]:
    return number, outcome if isinstance(outcome, dict) else outcome.result()


def _finished(folder: Path, number: int) -> dict | None:
    if not (folder / f"{number:05d}.tar").exists():
        return None
    return json.loads((folder / _stats_name(number)).read_text())


def _stats_name(number: int) -> str:
    return f"{number:05d}_stats.json"


def _pack_shard(folder: Path, recipe: Recipe, number: int, rows: list[Row]) -> dict:
    """In a process of its own: one shard and its statistics, in img2dataset's layout."""
    broken = []
    temporary = folder / f".{number:05d}.tar.tmp"
    with ThreadPoolExecutor(FETCHES) as pool, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
        encoded = (
            pool.map(partial(_try_encode, recipe), rows)
            if _any_remote(rows)
            else map(partial(_try_encode, recipe), rows)
        )
        for row, outcome in zip(rows, encoded, strict=True):
            if isinstance(outcome, str):
                broken.append({"row": row.number, "image": row.image, "reason": outcome})
                continue
            kind, data = outcome
            parts = {kind: data, "txt": row.text.encode()}
            if row.record:
                parts["json"] = json.dumps(row.record, ensure_ascii=False, default=str, sort_keys=True).encode()
            for kind, content in parts.items():
                info = tarfile.TarInfo(f"{row.number:09d}.{kind}")
                info.size, info.mode = len(content), 0o644
                tar.addfile(info, io.BytesIO(content))
    stats = {"count": len(rows), "successes": len(rows) - len(broken), "broken": broken}
    stats_file = folder / f".{number:05d}_stats.tmp"
    stats_file.write_text(json.dumps(stats, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    stats_file.replace(folder / _stats_name(number))
    temporary.replace(folder / f"{number:05d}.tar")
    return stats


def _any_remote(rows: list[Row]) -> bool:
    return any(is_remote(row.image) for row in rows)


def _try_encode(recipe: Recipe, row: Row) -> tuple[str, bytes] | str:
    """(kind, bytes) of a row's picture, or why the row is broken."""
    try:
        if not row.image:
            raise _BrokenRow("no image is given")
        if not row.text:
            raise _BrokenRow("no caption is given")
        data = _read(row.image)
        pixels = images.decode(data, MAX_PIXELS)
    except (_BrokenRow, images.ImageError) as error:
        return str(error)
    kind = _kind(data)
    if recipe.longest_side is not None and max(pixels.shape[:2]) > recipe.longest_side:
        return "jpg", simplejpeg.encode_jpeg(_shrink(pixels, recipe.longest_side), recipe.quality, "RGB", "420")
    return (kind, data) if kind else ("png", _png(pixels))


def _read(image: str) -> bytes:
    if not is_remote(image):
        try:
            with open(image, "rb") as file:
                return file.read(MAX_BYTES)
        except OSError as error:
            raise _BrokenRow(f"cannot be read: {error.strerror}") from None
    for attempt in range(1, TRIES + 1):
        try:
            with open_remote(image) as remote:
                data = b"".join(_at_most(remote.chunks(1 << 16), MAX_BYTES))
                if remote.size is not None and len(data) != remote.size:
                    raise RemoteError(f"{len(data):,} of {remote.size:,} bytes came")
                return data
        except RemoteError as error:
            if error.final or attempt == TRIES:
                raise _BrokenRow(f"cannot be fetched: {error}") from None
    raise AssertionError


def _at_most(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        size -= len(chunk)
        if size < 0:
            raise _BrokenRow("the file is too large for a picture")


def _kind(data: bytes) -> str | None:
    with Image.open(io.BytesIO(data)) as image:
        return KINDS.get(image.format)


def _shrink(pixels: np.ndarray, longest_side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = longest_side / max(height, width)
    return np.ascontiguousarray(images.resize(pixels, max(1, round(height * scale)), max(1, round(width * scale))))


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()
