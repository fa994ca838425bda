"""The samples of a list of shards as encoded parts: sample `number` of shard `shard`, from wherever the shard lies."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from mmscale.config import DataConfig
from mmscale.data.captions import CaptionFields, SampleError, json_object
from mmscale.data.counts import known_counts
from mmscale.data.index import Indexes, ShardIndex, ShardSummary
from mmscale.data.indexing import summarize
from mmscale.data.paths import shard_name
from mmscale.data.store import ShardStore
from mmscale.data.tar import BLOCK, header_name, split_name
from mmscale.errors import UserError

logger = logging.getLogger(__name__)

MAX_GAP = 64 * 1024  # members that lie this close together are read at once


@dataclass
class RawSample:
    """A sample's encoded parts. `captions` holds the texts of each text field that the sample has."""

    key: str
    image: bytes | memoryview
    captions: list[list[str]]
    record: dict


class Shards:
    """A list of shards.

    counts: samples of each shard. sizes: bytes, 0 where unknown. digests: what tells a shard from a changed one of the
    same name. All are known without reading a shard where `data.counts` names a manifest; such a shard is indexed when
    it is first entered.

    Raises UserError for a shard that does not exist, is not a tar, holds no images, or is damaged (see
    data.on_damaged_shard).
    """

    def __init__(self, shards: Sequence[str], data: DataConfig):
        self._image_kinds = [kind.strip().lower() for kind in data.image_key.split(";")]
        self._captions = CaptionFields(data.text_key, data.max_caption_bytes)
        self._on_damage = data.on_damaged_shard
        self._store = ShardStore(data.index_dir, data.cache_dir, data.cache_gib)
        self._indexes = Indexes(self._store)
        self._warned: set[int] = set()
        known = known_counts(data.counts, shards) if data.counts else None
        if known is None:
            summarize(self._indexes, self._store, shards)
        self.paths, self.counts, self.sizes, self.digests = [], [], [], []
        for path in shards:
            if known is not None:
                count, size, digest = known[path]
            else:
                summary = self._summary(path)
                if not self._usable(path, summary.problems, summary.num_samples):
                    continue
                if not set(self._image_kinds) & set(summary.kinds):
                    found = ", ".join(summary.kinds) or "none"
                    raise UserError(f"{path}: holds no images ({data.image_key}); kinds of members found: {found}")
                count, size, digest = summary.num_samples, summary.tar_bytes, summary.digest
                self._warned.add(len(self.paths))
            self.paths.append(path)
            self.counts.append(count)
            self.sizes.append(size)
            self.digests.append(digest)
        self.names = [shard_name(path) for path in self.paths]

    def enter(self, shard: int) -> None:
        """Fetches and indexes a shard ahead of its first sample. Raises SampleError."""
        self._index(shard)

    def read(self, shard: int, number: int, *, with_record: bool = False, with_image: bool = True) -> RawSample:
        """The encoded parts of a sample. Raises SampleError."""
        index = self._index(shard)
        members = self._members(index, shard, number)
        image_kind = next((kind for kind in self._image_kinds if kind in members), None)
        if with_image and image_kind is None:
            raise SampleError("the sample has no image")
        wanted = self._captions.kinds & members.keys()
        if with_image:
            wanted.add(image_kind)
        if with_record and "json" in members:
            wanted.add("json")
        key, parts = self._read_members(index, shard, number, {kind: members[kind] for kind in wanted})
        image = parts.pop(image_kind) if with_image else b""
        texts = {kind: bytes(data) for kind, data in parts.items()}
        record = json_object(texts["json"]) if "json" in texts else {}
        return RawSample(key, image, self._captions.read(texts, record), record)

    def key(self, shard: int, number: int) -> str:
        """The key of a sample; "?" where its shard cannot be read."""
        try:
            index = self._index(shard)
            first = list(self._members(index, shard, number).items())[:1]
            return self._read_members(index, shard, number, dict(first))[0]
        except SampleError:
            return "?"

    def close(self) -> None:
        self._store.close()

    def _summary(self, path: str) -> ShardSummary:
        try:
            return self._indexes.summary(path)
        except FileNotFoundError:
            raise UserError(f"no such shard: {path}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None

    def _usable(self, path: str, problems: list[str], num_samples: int) -> bool:
        """Whether a shard is read, by what is wrong with it. Raises UserError where that stops the run."""
        if not problems:
            return True
        what = f"{path} is damaged: {'; '.join(problems[:3])}; {num_samples} samples of it are whole"
        if self._on_damage == "stop":
            raise UserError(f"{what}. Replace it, or set data.on_damaged_shard to use_rest or skip")
        logger.warning("%s (data.on_damaged_shard: %s)", what, self._on_damage)
        return self._on_damage == "use_rest"

    def _index(self, shard: int) -> ShardIndex:
        try:
            index = self._indexes.index(self.paths[shard])
        except (OSError, UserError) as error:
            raise SampleError(f"the shard cannot be used: {error}") from None
        if len(index) != self.counts[shard] or index.summary.problems:
            self._entered_otherwise(shard, index)
        return index

    def _entered_otherwise(self, shard: int, index: ShardIndex) -> None:
        """A shard that was counted by a manifest turns out to be damaged, or to hold another number of samples."""
        if shard not in self._warned:
            self._warned.add(shard)
            usable = self._usable(self.paths[shard], index.summary.problems, len(index))
            if usable and len(index) != self.counts[shard]:
                logger.warning(
                    "%s holds %d samples, not %d as counted: %s", self.paths[shard], len(index), self.counts[shard],
                    "the rest is masked" if len(index) < self.counts[shard] else "the others are not used",
                )  # fmt: skip
        if index.summary.problems and self._on_damage == "skip":
            raise SampleError("the shard is damaged and left out (data.on_damaged_shard: skip)")

    def _members(self, index: ShardIndex, shard: int, number: int) -> dict[str, tuple[int, int]]:
        if number >= len(index):
            raise SampleError(f"the shard holds {len(index)} samples, fewer than counted ({self.counts[shard]})")
        return index.members(number)

    def _read_members(
        self, index: ShardIndex, shard: int, number: int, wanted: dict[str, tuple[int, int]]
    ) -> tuple[str, dict[str, memoryview]]:
        """(key, kind -> bytes). Each member is read together with the header before it, which must name the sample."""
        if not wanted:
            return self.key(shard, number), {}
        begin = min(offset for offset, _ in wanted.values()) - BLOCK
        end = max(offset + size for offset, size in wanted.values())
        together = end - begin <= sum(size for _, size in wanted.values()) + MAX_GAP
        parts, keys = {}, set()
        try:
            whole = memoryview(self._store.read(self.paths[shard], begin, end - begin) if together else b"")
            for kind, (offset, size) in wanted.items():
                if together:
                    member = whole[offset - BLOCK - begin : offset - begin + size]
                else:
                    member = memoryview(self._store.read(self.paths[shard], offset - BLOCK, BLOCK + size))
                if len(member) < BLOCK + size:
                    raise SampleError("the shard has become shorter since it was indexed")
                parts[kind] = member[BLOCK:]
                named = split_name(header_name(bytes(member[:BLOCK])))
                keys.add(named[0] if named else "")
        except OSError as error:
            raise SampleError(f"the shard cannot be read: {error}") from None
        key = index.summary.long_keys.get(number)
        if key is None:
            key = keys.pop()
            if keys or not key:
                raise SampleError("the shard has changed since it was indexed")
        return key, parts
