"""Which shards a user means: a path, a folder, a glob, brace notation, `@list.txt`, or a list of these."""

import glob
import os
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from mmscale.config import Paths
from mmscale.errors import UserError

PIPE = "pipe:"


def expand(paths: Paths, what: str = "shards", pipes: bool = False) -> list[str]:
    """The shards that `paths` names, in a fixed order; `what` is the key or argument that error messages mention.

    A list keeps its order, a glob and a folder are sorted by name. Raises UserError for a shard that does not exist,
    a pattern that matches nothing and a shard that is named twice.
    """
    shards = [shard for path in ([paths] if isinstance(paths, str) else paths) for shard in _expand_one(path, what)]
    if not pipes and any(shard.startswith(PIPE) for shard in shards):
        raise UserError(
            f"{what}: a pipe: source runs a shell command and cannot be indexed; if you trust it, "
            "set data.mode: stream and data.allow_pipe: true"
        )
    if not shards:
        raise UserError(f"{what}: no shards are given")
    seen = set()
    for shard in shards:
        if shard in seen:
            raise UserError(f"{what}: {shard} is listed twice; to read a data set more often, give it a weight")
        seen.add(shard)
    return shards


def is_remote(shard: str) -> bool:
    return "://" in shard


def shard_name(shard: str) -> str:
    """The name of a shard in logs and sample keys: `s3://bucket/train-00000.tar` is `train-00000`."""
    return os.path.basename(shard.partition("?")[0]).removesuffix(".tar")


def _expand_one(path: str, what: str) -> list[str]:
    if path.startswith("@"):
        return _from_list(Path(path[1:]), what)
    if path.startswith(PIPE) or is_remote(path):
        return _braces(path, what)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        if not found:
            raise UserError(f"{what}: the folder {path} holds no .tar files")
        return found
    if os.path.exists(path):
        return [path]
    return [shard for pattern in _braces(path, what) for shard in _existing(pattern, what)]


def _existing(pattern: str, what: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    if not glob.has_magic(pattern):
        raise UserError(f"{what}: no such shard: {pattern}")
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f"{what}: no shard matches {pattern}")
    return found


def _braces(pattern: str, what: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise UserError(f"{what}: the braces of {pattern} do not match") from None


def _from_list(path: Path, what: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: the list @{path} cannot be read: {error}") from None
    entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return [shard for entry in entries for shard in _expand_one(entry, f"{what} (@{path})")]
