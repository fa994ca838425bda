"""What `mmscale pack` reads: folders of pictures with sidecar texts, and tables of paths or URLs with captions."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmscale.data.paths import is_remote
from mmscale.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """A picture (path or URL) and its caption. `number` counts all rows of the source, broken ones too."""

    number: int
    image: str
    text: str
    record: dict


def read_rows(source: str, image: str, text: str) -> Iterator[Row]:
    """The rows of a folder, or of a CSV, TSV, JSONL or Parquet file with columns `image` and `text`, in a fixed order.

    A relative path in a table starts at the table's folder. What lacks a caption or path comes with an empty one.
    Raises UserError.
    """
    path = Path(source)
    if path.is_dir():
        yield from _folder_rows(path)
        return
    if not path.exists():
        raise UserError(f"{source}: no such folder or table")
    for number, record in enumerate(_records(path, (image, text))):
        where, caption = str(record.pop(image, None) or ""), record.pop(text, None)
        if where and not is_remote(where):
            where = str(path.parent / where)
        yield Row(number, where, str(caption).strip() if caption is not None else "", record)


def _folder_rows(folder: Path) -> Iterator[Row]:
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not pictures:
        hint = "; it holds shards, which are read as they are" if any(folder.rglob("*.tar")) else ""
        raise UserError(f"{folder}: holds no pictures{hint}")
    for number, picture in enumerate(pictures):
        text, record = "", {}
        try:
            if (sidecar := picture.with_suffix(".json")).exists():
                content = json.loads(sidecar.read_text(encoding="utf-8"))
                record = content if isinstance(content, dict) else {}
                text = str(record.get("caption") or "").strip()
            if (sidecar := picture.with_suffix(".txt")).exists():
                text = sidecar.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            text, record = "", {}
        yield Row(number, str(picture), text, record)


def _records(path: Path, columns: tuple[str, str]) -> Iterator[dict]:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file, delimiter=TABLE_SUFFIXES[suffix])
            _check_columns(path, columns, reader.fieldnames or [])
            for row in reader:
                yield {name: value for name, value in row.items() if name is not None and isinstance(value, str)}
    elif suffix in (".jsonl", ".ndjson"):
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file):
                if line.strip():
                    record = _json_line(line)
                    if number == 0:
                        _check_columns(path, columns, list(record))
                    yield record
    elif suffix == ".parquet":
        yield from _parquet_records(path, columns)
    else:
        raise UserError(f"{path}: expected a folder, or a .csv, .tsv, .jsonl or .parquet file")


def _json_line(line: str) -> dict:
    """A broken line is a row without anything."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _parquet_records(path: Path, columns: tuple[str, str]) -> Iterator[dict]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        _check_columns(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=4096):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None


def _check_columns(path: Path, columns: tuple[str, str], found: list[str]) -> None:
    for option, column in zip(("--image", "--text"), columns, strict=True):
        if column not in found:
            raise UserError(f"{path}: has no column `{column}` ({option}); columns: {', '.join(map(str, found))}")
