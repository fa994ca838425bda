"""Walking a tar file by its headers, with every check that a stream reader leaves out.

A damaged header is not taken for the end of the file: the walk looks for the next header that is whole, goes on from
there, and says what lay between. Formats: ustar, GNU long names, pax (POSIX.1-2001, `pax` Interchange Format).
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

BLOCK = 512
HEAD = 4096  # bytes at the start of a member that go into the shard's digest
_ZEROS = bytes(BLOCK)
_REGULAR = bytes([0]) + b"07"
_NO_DATA = b"123456"
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: where its data lies. `run` counts the damaged stretches before it."""

    name: str
    offset: int
    size: int
    run: int
    long_name: bool
    head: bytes


@dataclass
class TarReport:
    """What a walk found to be wrong: `problems` are sentences, in the order of the file."""

    problems: list[str] = field(default_factory=list)
    is_tar: bool = False


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` is sample `a/b`, kind `seg.png`, as in WebDataset; None for hidden and extensionless names."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def walk(file: BinaryIO, report: TarReport) -> Iterator[Member]:
    """The regular members of an open tar, in order; what is damaged goes to `report`."""
    fd, end = file.fileno(), os.fstat(file.fileno()).st_size
    position, run, long_name = 0, 0, None
    while True:
        block = os.pread(fd, BLOCK + HEAD, position)
        head, block = block[BLOCK:], block[:BLOCK]
        if block == _ZEROS:
            following = _first_nonzero(fd, position)
            if following is None:
                if end - position < 2 * BLOCK:
                    report.problems.append("the second of the two zero blocks that end a tar is missing")
                return
            report.problems.append(f"more data follows the end mark at byte {position:,}")
            position, run, long_name = _next_header(fd, following - following % BLOCK), run + 1, None
            if position is None:
                return
            continue
        if len(block) < BLOCK:
            report.problems.append(f"the file ends at byte {end:,} without the two zero blocks that end a tar")
            return
        header = _parse(block)
        if header is None:
            found = _next_header(fd, position + 1)
            until = "the end" if found is None else f"byte {found:,}"
            report.problems.append(f"damaged header at byte {position:,}: what lies up to {until} is lost")
            position, run, long_name = found, run + 1, None
            if position is None:
                return
            continue
        report.is_tar = True
        name, size, kind = header
        data = position + BLOCK
        if kind in _NO_DATA:
            size = 0
        if kind in b"xg" and data + size <= end:
            records = _pax(os.pread(fd, size, data)) if size <= 1 << 20 else None
            if records is None:
                report.problems.append(f"damaged pax header at byte {position:,}")
                run += 1
            elif kind == b"x":
                long_name = records.get("path", long_name)
        elif kind == b"L" and data + size <= end:
            long_name = os.pread(fd, min(size, 1 << 16), data).rstrip(b"\0").decode("utf-8", "replace")
        elif kind in _REGULAR:
            member_name, is_long, long_name = long_name or name, long_name is not None, None
            if data + size > end:
                report.problems.append(f"{member_name} is cut off: {max(end - data, 0):,} of {size:,} bytes are there")
                return
            if size >= 1 << 32:
                report.problems.append(f"{member_name} is larger than 4 GiB and is left out")
            else:
                yield Member(member_name, data, size, run, is_long, head[:size])
        else:
            long_name = None
        position = data + -(-size // BLOCK) * BLOCK


def header_name(block: bytes) -> str:
    """The name that a ustar header holds (cut at 100 bytes where a pax or GNU header carries the whole)."""
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _parse(block: bytes) -> tuple[str, int, bytes] | None:
    """(name, size, type) of a header whose checksum is right, None for anything else."""
    try:
        stored = int(block[148:156].strip(b" \0"), 8)
        size_field = block[124:136]
        if size_field[0] == 0x80:
            size = int.from_bytes(size_field[1:], "big")
        else:
            size = int(size_field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    if size < 0 or stored != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    return header_name(block), size, block[156:157]


def _pax(data: bytes) -> dict[str, str] | None:
    """The `length key=value` records of a pax header, None when they do not add up."""
    records = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) + 3 <= int(length) <= len(data):
            return None
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
    return records


def _first_nonzero(fd: int, position: int) -> int | None:
    while chunk := os.pread(fd, 1 << 20, position):
        stripped = chunk.lstrip(b"\0")
        if stripped:
            return position + len(chunk) - len(stripped)
        position += len(chunk)
    return None


def _next_header(fd: int, position: int) -> int | None:
    """The first whole ustar header that starts at `position` or later, at any alignment (a splice may shift all)."""
    magic, at = b"ustar", 257
    while chunk := os.pread(fd, (1 << 20) + BLOCK, position):
        hit = chunk.find(magic, at)
        while hit >= 0:
            block = chunk[hit - at : hit - at + BLOCK]
            if len(block) == BLOCK and _parse(block) is not None:
                return position + hit - at
            hit = chunk.find(magic, hit + 1)
        if len(chunk) < (1 << 20) + BLOCK:
            return None
        position += 1 << 20
    return None
