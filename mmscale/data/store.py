"""The bytes of shards by offset, with the files last used kept open; remote shards come through the node's cache."""

import hashlib
import os
import threading
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from mmscale.data.cache import ShardCache
from mmscale.data.paths import is_remote
from mmscale.data.recent import Recent
from mmscale.errors import UserError

SIDECAR_SUFFIX = ".index"


@dataclass(frozen=True)
class FileFacts:
    """A shard's file as it stands, and where its index belongs."""

    size: int
    mtime_ns: int
    sidecar: Path


class ShardStore:
    """Reads ranges of shards from any number of threads.

    Ranges are read with pread: a memory map of a file that is cut short while it is read kills the process.
    """

    def __init__(
        self,
        index_dir: str | None = None,
        cache_dir: str | None = None,
        cache_gib: float = 100.0,
        max_open: int = 128,
    ):
        self.index_dir = index_dir
        self._cache = ShardCache(cache_dir, int(cache_gib * 2**30)) if cache_dir else None
        self._files: Recent[FileIO] = Recent(max_open)
        self._lock = threading.Lock()

    def local_path(self, shard: str) -> str:
        """Where the shard's file lies on this machine; a remote one is fetched first. Raises OSError, UserError."""
        return self._remote(shard).fetch(shard) if is_remote(shard) else shard

    def known_facts(self, shard: str) -> FileFacts | None:
        """None for a remote shard that was never fetched. Raises OSError, UserError."""
        if is_remote(shard):
            cache = self._remote(shard)
            fetched = cache.known(shard)
            return fetched and FileFacts(fetched.size, 0, cache.sidecar_path(fetched.digest))
        stat = os.stat(shard)
        return FileFacts(stat.st_size, stat.st_mtime_ns, self._local_sidecar(shard))

    def facts(self, shard: str) -> FileFacts:
        """A remote shard that was fetched once is not fetched again for this. Raises OSError, UserError."""
        facts = self.known_facts(shard)
        if facts is None:
            self._remote(shard).fetch(shard)
            facts = self.known_facts(shard)
        return facts

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer where the file ends. Raises OSError."""
        file = self._open(shard)
        data = os.pread(file.fileno(), size, offset)
        while len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
            data += more
        return data

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _remote(self, shard: str) -> ShardCache:
        if self._cache is None:
            raise UserError(f"{shard} is remote: set data.cache_dir to a folder on this node's disk")
        return self._cache

    def _local_sidecar(self, shard: str) -> Path:
        if self.index_dir is None:
            return Path(shard + SIDECAR_SUFFIX)
        # Folders of different data sets hold shards of the same name.
        folder = hashlib.blake2b(os.path.dirname(os.path.abspath(shard)).encode(), digest_size=6).hexdigest()
        return Path(self.index_dir) / folder / (os.path.basename(shard) + SIDECAR_SUFFIX)

    def _open(self, shard: str) -> FileIO:
        with self._lock:
            file = self._files.get(shard)
        if file is None:
            # Nobody closes a file that has left: another thread may be reading it, and its last reference closes it.
            file = FileIO(self.local_path(shard))
            with self._lock:
                self._files.put(shard, file)
        return file
