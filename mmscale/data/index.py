"""The index of a shard: where each sample's members lie in the tar, kept beside it as a small sidecar file.

Sidecar (`train-00000.tar.index`), little-endian: magic, checksum and length of a JSON header, the header, and one
16-byte record a member. It belongs to its shard as long as the shard's size and time of change are those it names.
"""

import hashlib
import json
import logging
import os
import struct
import threading
from collections import Counter
from dataclasses import asdict, dataclass, fields

import numpy as np

from mmscale.data.recent import Recent
from mmscale.data.store import FileFacts, ShardStore
from mmscale.data.tar import Member, TarReport, split_name, walk
from mmscale.errors import UserError

logger = logging.getLogger(__name__)

MAGIC = b"MMINDEX1"
PREAMBLE = struct.Struct("<8s16sI")
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("kind", "<u2"), ("first", "<u2")])


@dataclass(frozen=True)
class ShardSummary:
    """What is known of a shard without its offsets.

    problems: sentences about damage, none for a whole tar. lost_keys: samples that are there in part. kinds: member
    kinds by how they are numbered in the records. long_keys: sample number -> key, where a header's name is too short.
    digest: of every member's name, size and first bytes.
    """

    num_samples: int
    tar_bytes: int
    digest: str
    kinds: list[str]
    problems: list[str]
    lost_keys: list[str]
    long_keys: dict[int, str]
    records_digest: str


class ShardIndex:
    """A shard's samples: `records` holds their members, sample by sample."""

    def __init__(self, summary: ShardSummary, records: np.ndarray):
        self.summary = summary
        self.records = records
        self._bounds = np.append(np.flatnonzero(records["first"]), len(records))

    def __len__(self) -> int:
        return self.summary.num_samples

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """kind -> (offset, size) of sample number `sample`."""
        rows = self.records[self._bounds[sample] : self._bounds[sample + 1]].tolist()
        return {self.summary.kinds[kind]: (offset, size) for offset, size, kind, _ in rows}


class Indexes:
    """The indexes of shards, from their sidecars; what is missing or out of date is built and written.

    Where a sidecar cannot be written (the folder is read-only, and no data.index_dir is given) the index is kept in
    memory. Safe for use from several threads.
    """

    def __init__(self, store: ShardStore, max_loaded: int = 160):
        self._store = store
        self._loaded = Recent(max_loaded)
        self._unwritten: dict[str, ShardIndex] = {}
        self._lock = threading.Lock()

    def has(self, shard: str) -> bool:
        """Whether the index is there and current; False for a shard that cannot be had, too."""
        if shard in self._unwritten:
            return True
        try:
            facts = self._store.known_facts(shard)
        except OSError:
            return False
        return facts is not None and _read_sidecar(facts, with_records=False) is not None

    def unwritten(self, shard: str) -> ShardIndex | None:
        return self._unwritten.get(shard)

    def keep(self, shard: str, index: ShardIndex) -> None:
        """Takes an index that another process made and could not write."""
        self._unwritten[shard] = index

    def summary(self, shard: str) -> ShardSummary:
        """Raises OSError when the shard cannot be had, UserError when it is not a tar."""
        if shard in self._unwritten:
            return self._unwritten[shard].summary
        facts = self._store.facts(shard)
        found = _read_sidecar(facts, with_records=False)
        return found[0] if found is not None else self._build(shard).summary

    def index(self, shard: str) -> ShardIndex:
        """Raises OSError when the shard cannot be had, UserError when it is not a tar."""
        with self._lock:
            index = self._unwritten.get(shard) or self._loaded.get(shard)
        if index is None:
            found = _read_sidecar(self._store.facts(shard), with_records=True)
            index = ShardIndex(*found) if found is not None else self._build(shard)
            with self._lock:
                self._loaded.put(shard, index)
        return index

    def _build(self, shard: str) -> ShardIndex:
        path = self._store.local_path(shard)
        facts = self._store.facts(shard)  # of the file as it was before it is read
        index = build_index(path, shard)
        if not _write_sidecar(facts, index):
            logger.info("%s: no index can be written beside it; set data.index_dir to keep it", shard)
            self._unwritten[shard] = index
        return index


def build_index(path: str, shard: str | None = None) -> ShardIndex:
    """Walks the tar at `path` and groups its members into samples.

    shard: what messages call it. Raises OSError, and UserError when it is not a tar.
    """
    shard = shard or path
    report = TarReport()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        compressed = os.pread(file.fileno(), 2, 0) == b"\x1f\x8b"
        members = [] if compressed else list(walk(file, report))
    if compressed:
        raise UserError(f"{shard}: is compressed; shards are plain tars, so that samples can be found: gunzip it")
    if not report.is_tar:
        raise UserError(f"{shard}: is not a tar file")
    samples, lost = _group(members, report)
    digest = hashlib.blake2b(digest_size=16)
    for member in members:
        digest.update(f"{member.name}\0{member.size}\0".encode("utf-8", "replace"))
        digest.update(member.head)
    kinds: dict[str, int] = {}
    rows = [
        (member.offset, member.size, kinds.setdefault(kind, len(kinds)), int(number == 0))
        for sample in samples
        for number, (kind, member) in enumerate(sample.members.items())
    ]
    records = np.array(rows, dtype=RECORD)
    summary = ShardSummary(
        num_samples=len(samples),
        tar_bytes=size,
        digest=digest.hexdigest(),
        kinds=list(kinds),
        problems=report.problems,
        lost_keys=lost,
        long_keys={n: s.key for n, s in enumerate(samples) if any(m.long_name for m in s.members.values())},
        records_digest=_checksum(records.tobytes()).hex(),
    )
    return ShardIndex(summary, records)


@dataclass
class _Sample:
    key: str
    members: dict[str, Member]
    run: int


def _group(members: list[Member], report: TarReport) -> tuple[list[_Sample], list[str]]:
    """Members that lie side by side and share a key are a sample; returns the samples and the keys that are lost.

    A key that comes again is where wrong pairs could arise. Parts of one sample that lie apart are joined only in a tar
    that is otherwise whole, and a key whose members are ambiguous is given up.
    """
    groups: list[_Sample] = []
    ambiguous = set()
    for member in members:
        named = split_name(member.name)
        if named is None:
            continue
        key, kind = named
        last = groups[-1] if groups else None
        if last is None or last.key != key or last.run != member.run:
            groups.append(_Sample(key, {kind: member}, member.run))
        elif kind in last.members:
            ambiguous.add(key)
        else:
            last.members[kind] = member
    whole = not report.problems and not ambiguous
    first_of: dict[str, _Sample] = {}
    kept: list[_Sample] = []
    repeated = []
    for group in groups:
        first = first_of.setdefault(group.key, group)
        if group.key in ambiguous:
            continue
        if first is not group and whole and not first.members.keys() & group.members.keys():
            first.members |= group.members
            continue
        if first is not group:
            repeated.append(group.key)
        kept.append(group)
    if ambiguous:
        report.problems.append(f"two members of one kind share a key, such as {min(ambiguous)}: these samples are lost")
    if repeated:
        report.problems.append(f"{len(repeated)} samples have a key that came before, such as {repeated[0]}")
    if report.problems:
        kept, torn = _leave_out_torn(kept)
        ambiguous |= torn
    return kept, sorted(ambiguous)


def _leave_out_torn(samples: list[_Sample]) -> tuple[list[_Sample], set[str]]:
    """Where a tar is damaged, the samples beside the damage that lack members which most samples have are lost."""
    usual = set(Counter(frozenset(sample.members) for sample in samples).most_common(1)[0][0]) if samples else set()
    runs = [None, *[sample.run for sample in samples], None]
    kept, torn = [], set()
    for sample, before, after in zip(samples, runs, runs[2:], strict=False):
        beside = before != sample.run or after != sample.run
        if beside and sample.members.keys() < usual:
            torn.add(sample.key)
        else:
            kept.append(sample)
    return kept, torn


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _read_sidecar(facts: FileFacts, with_records: bool) -> tuple[ShardSummary, np.ndarray | None] | None:
    """A sidecar that is whole and belongs to the shard as it stands, else None."""
    try:
        with facts.sidecar.open("rb") as file:
            magic, checksum, length = PREAMBLE.unpack(file.read(PREAMBLE.size))
            if magic != MAGIC:
                return None
            encoded = file.read(length)
            if _checksum(encoded) != checksum:
                return None
            header = json.loads(encoded)
            if (header["tar_bytes"], header["mtime_ns"]) != (facts.size, facts.mtime_ns):
                return None
            records = file.read() if with_records else None
    except (OSError, ValueError, struct.error):
        return None
    header["long_keys"] = {int(number): key for number, key in header["long_keys"].items()}
    summary = ShardSummary(**{field.name: header[field.name] for field in fields(ShardSummary)})
    if records is None:
        return summary, None
    if _checksum(records).hex() != summary.records_digest:
        return None
    return summary, np.frombuffer(records, dtype=RECORD)


def _write_sidecar(facts: FileFacts, index: ShardIndex) -> bool:
    """Whole or not at all; False where the folder does not take it."""
    header = json.dumps(asdict(index.summary) | {"mtime_ns": facts.mtime_ns}, ensure_ascii=True).encode()
    path = facts.sidecar
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.stat().st_mode & 0o222:  # the superuser could write there all the same
            return False
        temporary.write_bytes(PREAMBLE.pack(MAGIC, _checksum(header), len(header)) + header + index.records.tobytes())
        temporary.replace(path)
    except OSError:
        return False
    return True
