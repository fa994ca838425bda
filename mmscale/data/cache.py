"""Remote shards on this node's disk: fetched once however many ranks ask, verified, and bounded in size.

    objects/DIGEST.tar   shards by the BLAKE2b of their bytes; the least recently used leave when the cache is full
    names/KEY.json       of each URL, what was fetched: {url, digest, size}; stays when the object leaves
    parts/KEY.part       a download under way, never seen by a reader; an interrupted one goes on where it ended,
    parts/KEY.version    if the source still is what it was (its ETag, for instance)
    locks/KEY.lock       held by who downloads it

KEY is a hash of the URL. Readers hold a shard's file open, so that it may leave while it is read.
"""

import fcntl
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mmscale.data.remote import RemoteError, open_remote
from mmscale.errors import UserError

logger = logging.getLogger(__name__)

TRIES = 8
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
CHUNK = 1 << 18


@dataclass(frozen=True)
class Fetched:
    """What a URL held when it was last fetched."""

    url: str
    digest: str
    size: int


class ShardCache:
    """A folder that all ranks of a node share. Safe for any number of threads and processes."""

    def __init__(self, folder: str, max_bytes: int, tries: int = TRIES, first_wait_s: float = FIRST_WAIT_S):
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._tries, self._first_wait_s = tries, first_wait_s
        try:
            for name in ("objects", "names", "parts", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {folder} cannot be written: {error.strerror}") from None

    def fetch(self, url: str) -> str:
        """The local file with the shard's bytes. Raises OSError when it cannot be had after several tries."""
        path = self._present(url)
        if path is None:
            with self._lock(_key(url)):
                path = self._present(url) or self._download(url)  # another rank may have been quicker
        return str(path)

    def known(self, url: str) -> Fetched | None:
        """What the URL held when it was last fetched, None when it never was."""
        try:
            return Fetched(**json.loads(self._name(url).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def object_path(self, digest: str) -> Path:
        return self.folder / "objects" / f"{digest}.tar"

    def sidecar_path(self, digest: str) -> Path:
        """Where the index of an object is kept; it stays when the object leaves."""
        return self.folder / "names" / f"{digest}.index"

    def _present(self, url: str) -> Path | None:
        fetched = self.known(url)
        if fetched is None:
            return None
        path = self.object_path(fetched.digest)
        try:
            if path.stat().st_size != fetched.size:
                return None
            os.utime(self._name(url))  # the time of last use
        except OSError:
            return None
        return path

    def _download(self, url: str) -> Path:
        part = self.folder / "parts" / f"{_key(url)}.part"
        wait = self._first_wait_s
        for attempt in range(1, self._tries + 1):
            try:
                digest, size = _transfer(url, part)
                break
            except RemoteError as error:
                if error.final or attempt == self._tries:
                    raise OSError(f"{url} cannot be fetched: {error}") from None
                logger.warning("%s: %s; try %d of %d follows", url, error, attempt + 1, self._tries)
                time.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, LONGEST_WAIT_S)
        before = self.known(url)
        if before is not None and before.digest != digest:
            logger.warning("%s has changed since it was last fetched", url)
        path = self.object_path(digest)
        os.utime(part, (0, 0))  # named by its content, the object is the same whenever it came
        os.replace(part, path)
        part.with_suffix(".version").unlink(missing_ok=True)
        _write_whole(self._name(url), json.dumps(asdict(Fetched(url, digest, size))))
        self._make_room(keep=digest)
        return path

    def _make_room(self, keep: str) -> None:
        with self._lock("room"):
            sizes = {path.stem: path.stat().st_size for path in (self.folder / "objects").glob("*.tar")}
            excess = sum(sizes.values()) - self.max_bytes
            if excess <= 0:
                return
            used: dict[str, float] = {}
            for name in (self.folder / "names").glob("*.json"):
                try:
                    digest = json.loads(name.read_text())["digest"]
                    used[digest] = max(used.get(digest, 0), name.stat().st_mtime)
                except (OSError, ValueError, KeyError):
                    continue
            for digest in sorted(sizes.keys() - {keep}, key=lambda digest: used.get(digest, 0)):
                if excess <= 0:
                    return
                self.object_path(digest).unlink(missing_ok=True)
                excess -= sizes[digest]

    def _name(self, url: str) -> Path:
        return self.folder / "names" / f"{_key(url)}.json"

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with open(self.folder / "locks" / f"{name}.lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _transfer(url: str, part: Path) -> tuple[str, int]:
    """Downloads the rest of `part`; returns digest and size of the whole. Raises RemoteError."""
    version_file = part.with_suffix(".version")
    version = (version_file.read_text() if version_file.exists() else "") or None
    with open(part, "ab") as file:
        begin = file.tell()
        with open_remote(url, begin, version) as remote:
            if remote.offset != begin:
                file.truncate(0)
            if remote.version != version:
                _write_whole(version_file, remote.version or "")
            for chunk in remote.chunks(CHUNK):
                file.write(chunk)
    size = part.stat().st_size
    if remote.size is not None and size != remote.size:
        if size > remote.size:
            part.unlink()
        raise RemoteError(f"{size:,} of {remote.size:,} bytes came")
    kind, expected = remote.checksum or ("md5", None)
    digest, checksum = hashlib.blake2b(digest_size=16), hashlib.new(kind, usedforsecurity=False)
    with open(part, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            checksum.update(chunk)
    if expected is not None and checksum.hexdigest() != expected:
        part.unlink()
        raise RemoteError("the bytes that came do not have the source's checksum")
    return digest.hexdigest(), size


def _key(url: str) -> str:
    return hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
