"""Indexing many shards: in parallel, one process of a node at a time; and the table and manifest of `mmscale index`."""

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mmscale.config import DataConfig, Paths
from mmscale.data.index import Indexes, ShardIndex, ShardSummary
from mmscale.data.paths import expand, is_remote, shard_name
from mmscale.data.progress import track
from mmscale.data.store import ShardStore
from mmscale.errors import UserError

logger = logging.getLogger(__name__)

WORTH_PROCESSES = 2 << 30  # bytes of shards; starting processes takes as long as walking about this much
FETCHES = 16


def summarize(indexes: Indexes, store: ShardStore, shards: Sequence[str], processes: int | None = None) -> None:
    """Makes every index that is missing, so that `indexes.summary` of each shard is at hand afterwards.

    Shards that cannot be indexed are left for `indexes.summary` to complain about.
    """
    missing = [shard for shard in shards if not indexes.has(shard)]
    if not missing:
        return
    with _one_at_a_time(missing[0]):
        missing = [shard for shard in missing if not indexes.has(shard)]  # another rank may have made them meanwhile
        local = [shard for shard in missing if not is_remote(shard)]
        remote = [shard for shard in missing if is_remote(shard)]
        size = sum(os.path.getsize(shard) for shard in local if os.path.exists(shard))
        processes = processes or min(os.cpu_count() or 1, len(local), 32)
        if processes > 1 and size > WORTH_PROCESSES:
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                for shard, index in _attempts(pool, partial(_build, store.index_dir), local):
                    if index is not None:
                        indexes.keep(shard, index)
        else:
            for shard in track(local, len(local), "indexing shards"):
                _try_summary(indexes, shard)
        with ThreadPoolExecutor(FETCHES) as pool:
            for _ in _attempts(pool, lambda shard: _try_summary(indexes, shard), remote):
                pass


def index_shards(
    shards: Paths,
    *,
    index_dir: str | None = None,
    cache_dir: str | None = None,
    manifest: str | None = None,
    processes: int | None = None,
) -> int:
    """`mmscale index`: writes or checks the indexes, prints counts, sizes and damage; 1 when a shard is damaged.

    manifest: file to write with every shard's count, size and digest, for `data.counts`.
    """
    from rich.console import Console
    from rich.table import Table

    paths = expand(shards)
    data = DataConfig(index_dir=index_dir, cache_dir=cache_dir)
    store = ShardStore(data.index_dir, data.cache_dir, data.cache_gib)
    indexes = Indexes(store)
    summarize(indexes, store, paths, processes)
    console = Console()
    table = Table("shard", "samples", "bytes", "members", "damage")
    found: list[ShardSummary] = []
    for path in paths:
        try:
            summary = indexes.summary(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        found.append(summary)
        if len(paths) <= 50 or summary.problems:
            damage = f"[red]{len(summary.problems)} problems[/red]" if summary.problems else "none"
            kinds = " ".join(summary.kinds)
            table.add_row(shard_name(path), f"{summary.num_samples:,}", f"{summary.tar_bytes:,}", kinds, damage)
    if table.row_count:
        console.print(table)
    damaged = [(path, summary) for path, summary in zip(paths, found, strict=True) if summary.problems]
    for path, summary in damaged:
        console.print(f"{path} is damaged; {_what_is_whole(indexes.index(path))}:", markup=False, highlight=False)
        for problem in summary.problems:
            console.print(f"  {problem}", markup=False, highlight=False)
        if summary.lost_keys:
            console.print(f"  there in part, and lost: {_some(summary.lost_keys)}", markup=False, highlight=False)
    samples, size = sum(s.num_samples for s in found), sum(s.tar_bytes for s in found)
    console.print(
        f"{len(paths):,} shards, {samples:,} samples, {size:,} bytes, {len(damaged)} damaged", highlight=False
    )
    if manifest:
        write_manifest(manifest, paths, found)
    return 1 if damaged else 0


def write_manifest(path: str, shards: Sequence[str], summaries: Sequence[ShardSummary]) -> None:
    """What `data.counts` reads: {"fingerprint", "shards": [{"url", "count", "bytes", "digest"}]}."""
    entries = [
        {"url": shard, "count": summary.num_samples, "bytes": summary.tar_bytes, "digest": summary.digest}
        for shard, summary in zip(shards, summaries, strict=True)
    ]
    fingerprint = hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"fingerprint": fingerprint, "shards": entries}, indent=0) + "\n")
    temporary.replace(path)


def _what_is_whole(index: ShardIndex) -> str:
    return f"{len(index):,} samples are whole" if len(index) else "no sample is whole"


def _some(keys: list[str], most: int = 10) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _attempts(
    pool: Executor, function: Callable[[str], ShardIndex | None], shards: list[str]
) -> Iterator[tuple[str, ShardIndex | None]]:
    yield from zip(shards, track(pool.map(function, shards), len(shards), "indexing shards"), strict=True)


def _build(index_dir: str | None, shard: str) -> ShardIndex | None:
    """In a process of its own: writes the index of a local shard, or returns the one that could not be written."""
    indexes = Indexes(ShardStore(index_dir))
    _try_summary(indexes, shard)
    return indexes.unwritten(shard)


def _try_summary(indexes: Indexes, shard: str) -> None:
    try:
        indexes.summary(shard)
    except (OSError, UserError) as error:
        logger.debug("%s: %s", shard, error)  # said again, and raised, when the shard is used


@contextmanager
def _one_at_a_time(shard: str) -> Iterator[None]:
    """The ranks of a node all want the same indexes: one makes them, the others wait."""
    name = hashlib.blake2b(os.path.dirname(os.path.abspath(shard)).encode(), digest_size=8).hexdigest()
    try:
        file = open(Path(tempfile.gettempdir()) / f"mmscale-index-{os.getuid()}-{name}.lock", "wb")  # noqa: SIM115
    except OSError:
        yield  # without a lock the work is done more than once, with the same outcome
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
