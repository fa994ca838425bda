"""The index of a shard: where each sample's members lie in the tar, kept beside it as a small sidecar file.

Sidecar (`train-00000.tar.index`), little-endian: the magic, the length of a JSON header, the header, and one 16-byte
record a member. A sidecar belongs to its shard as long as the shard's size and time of change are those it names.
"""

import hashlib
import json
import logging
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmscale.data.paths import shard_name
from mmscale.data.tar import Member, TarReport, split_name, walk
from mmscale.errors import UserError

logger = logging.getLogger(__name__)

MAGIC = b"MMINDEX1"
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("kind", "<u2"), ("first", "<u2")])
SUFFIX = ".index"


@dataclass
class ShardIndex:
    """One shard's samples. `records` holds their members sample by sample; `starts[i]` is where sample i begins."""

    records: np.ndarray
    kinds: list[str]
    long_keys: dict[int, str]
    problems: list[str]
    lost_keys: list[str]
    tar_bytes: int
    digest: str
    starts: np.ndarray = field(init=False)

    def __post_init__(self):
        self.starts = np.flatnonzero(self.records["first"])

    def __len__(self) -> int:
        return len(self.starts)

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """kind -> (offset, size) of sample number `sample`."""
        start = self.starts[sample]
        stop = self.starts[sample + 1] if sample + 1 < len(self.starts) else len(self.records)
        rows = self.records[start:stop].tolist()
        return {self.kinds[kind]: (offset, size) for offset, size, kind, _ in rows}

    def has_any(self, kinds: list[str]) -> bool:
        wanted = [number for number, kind in enumerate(self.kinds) if kind in kinds]
        return bool(np.isin(self.records["kind"], wanted).any())


def load_index(shard: str, index_dir: str | None = None) -> ShardIndex:
    """The index of a local shard: from its sidecar when that is current, else built and, where possible, written.

    Raises UserError when the shard does not exist or is not a tar.
    """
    try:
        stat = os.stat(shard)
    except OSError as error:
        raise UserError(f"no such shard: {shard} ({error.strerror})") from None
    sidecar = sidecar_path(shard, index_dir)
    index = _read_sidecar(sidecar, stat)
    if index is None:
        index = build_index(shard)
        _write_sidecar(sidecar, index, stat)
    return index


def sidecar_path(shard: str, index_dir: str | None) -> Path:
    if index_dir is None:
        return Path(shard + SUFFIX)
    # Folders of different data sets hold shards of the same name.
    folder = hashlib.blake2b(os.path.dirname(os.path.abspath(shard)).encode(), digest_size=6).hexdigest()
    return Path(index_dir) / folder / (os.path.basename(shard) + SUFFIX)


def build_index(shard: str) -> ShardIndex:
    """Walks a tar and groups its members into samples. Raises UserError when it is not a tar."""
    report = TarReport()
    try:
        with open(shard, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            compressed = os.pread(file.fileno(), 2, 0) == b"\x1f\x8b"
            members = [] if compressed else list(walk(file, report))
    except OSError as error:
        raise UserError(f"{shard}: cannot be read: {error.strerror}") from None
    if compressed:
        raise UserError(f"{shard}: is compressed; shards are plain tars, so that samples can be found: gunzip it")
    if not report.is_tar:
        raise UserError(f"{shard}: is not a tar file")
    groups, lost = _group(members, report)
    return _assemble(groups, lost, report, size, members)


@dataclass
class _Group:
    key: str
    members: dict[str, Member]
    run: int


def _group(members: list[Member], report: TarReport) -> tuple[list[_Group], list[str]]:
    """Members that lie side by side and share a key are a sample; returns the samples and the keys that are lost.

    A key that comes again is where wrong pairs could arise. Parts of one sample that lie apart are joined only in a
    tar that is otherwise whole; a key whose members are ambiguous is given up.
    """
    groups: list[_Group] = []
    ambiguous = set()
    for member in members:
        named = split_name(member.name)
        if named is None:
            continue
        key, kind = named
        last = groups[-1] if groups else None
        if last is None or last.key != key or last.run != member.run:
            groups.append(_Group(key, {kind: member}, member.run))
        elif kind in last.members:
            ambiguous.add(key)
        else:
            last.members[kind] = member
    whole = not report.problems
    first_of: dict[str, _Group] = {}
    kept: list[_Group] = []
    split = repeated = 0
    for group in groups:
        first = first_of.setdefault(group.key, group)
        if group.key in ambiguous:
            continue
        if first is group:
            kept.append(group)
        elif whole and not first.members.keys() & group.members.keys():
            first.members |= group.members
            split += 1
        else:
            repeated += 1
            kept.append(group)
    if ambiguous:
        report.problems.append(
            f"{len(ambiguous)} keys hold two members of one kind, such as {min(ambiguous)}: these samples are lost"
        )
    if repeated:
        report.problems.append(f"{repeated} samples have a key that came before")
    if split:
        logger.info("%d samples have members that lie apart in the tar; they were joined by their key", split)
    return kept, sorted(ambiguous)


def _assemble(
    groups: list[_Group], lost: list[str], report: TarReport, tar_bytes: int, members: list[Member]
) -> ShardIndex:
    kinds: dict[str, int] = {}
    rows = []
    for group in groups:
        for number, (kind, member) in enumerate(group.members.items()):
            rows.append((member.offset, member.size, kinds.setdefault(kind, len(kinds)), int(number == 0)))
    digest = hashlib.blake2b(digest_size=16)
    for member in members:
        digest.update(f"{member.name}\0{member.size}\0".encode())
        digest.update(member.head)
    long_keys = {
        number: group.key
        for number, group in enumerate(groups)
        if any(member.long_name for member in group.members.values())
    }
    return ShardIndex(
        np.array(rows, dtype=RECORD),
        list(kinds),
        long_keys,
        report.problems,
        lost,
        tar_bytes,
        digest.hexdigest(),
    )


def _read_sidecar(path: Path, stat: os.stat_result) -> ShardIndex | None:
    """A sidecar that is whole and belongs to the shard with this `stat`, else None."""
    try:
        data = path.read_bytes()
        magic, checksum, length = struct.unpack_from("<8s16sI", data)
        body = data[28:]
        if magic != MAGIC or hashlib.blake2b(body, digest_size=16).digest() != checksum:
            return None
        header = json.loads(body[:length])
    except (OSError, ValueError, struct.error):
        return None
    if (header["tar_bytes"], header["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
        return None
    return ShardIndex(
        np.frombuffer(body, dtype=RECORD, offset=length),
        header["kinds"],
        {int(number): key for number, key in header["long_keys"].items()},
        header["problems"],
        header["lost_keys"],
        header["tar_bytes"],
        header["digest"],
    )


def _write_sidecar(path: Path, index: ShardIndex, stat: os.stat_result) -> None:
    header = {
        "kinds": index.kinds,
        "long_keys": index.long_keys,
        "problems": index.problems,
        "lost_keys": index.lost_keys,
        "tar_bytes": index.tar_bytes,
        "mtime_ns": stat.st_mtime_ns,
        "digest": index.digest,
    }
    encoded = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    body = encoded + index.records.tobytes()
    checksum = hashlib.blake2b(body, digest_size=16).digest()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.stat().st_mode & 0o222:
            raise PermissionError
        temporary.write_bytes(struct.pack("<8s16sI", MAGIC, checksum, len(encoded)) + body)
        temporary.replace(path)
    except OSError:
        logger.info("%s: the folder is read-only; set data.index_dir to keep its indexes", shard_name(str(path)))
