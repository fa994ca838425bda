"""How many samples each shard holds, as told by a manifest, so that no shard has to be read before the first step."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence

import fsspec

from mmscale.data.paths import shard_name
from mmscale.errors import UserError

STATS = "stats"


def known_counts(source: str, shards: Sequence[str]) -> dict[str, tuple[int, int, str]]:
    """shard -> (number of samples, bytes or 0, digest or "").

    source: `stats` reads img2dataset's `NAME_stats.json` beside each shard; anything else is the path or URL of a
    manifest: what `mmscale index --manifest` writes, a JSON list or lines of {"url", "count"}, or webdataset's
    {"shardlist": [{"url", "nsamples"}]}. Shards are matched by their whole path first, then by their name, where only
    one shard and one line have it. Raises UserError.
    """
    if source == STATS:
        return {shard: (_stats_count(shard), 0, "") for shard in shards}
    entries = list(_entries(source))
    by_url = {url: found for url, *found in entries}
    by_name = {shard_name(url): found for url, *found in entries}
    listed = Counter(shard_name(url) for url in by_url)
    wanted = Counter(map(shard_name, shards))
    counts = {}
    for shard in shards:
        name = shard_name(shard)
        found = by_url.get(shard) or by_name.get(name)
        if found is None:
            raise UserError(f"data.counts: {source} says nothing about the shard {shard}")
        if shard not in by_url and (listed[name] > 1 or wanted[name] > 1):
            raise UserError(f"data.counts: {source} does not list {shard}, and several shards are called {name}")
        counts[shard] = tuple(found)
    return counts


def _entries(source: str) -> Iterator[tuple[str, int, int, str]]:
    text = _read(source)
    try:
        try:
            content = json.loads(text)
        except ValueError:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        if isinstance(content, dict):
            content = content.get("shards") or content.get("shardlist") or [content]
        for entry in content:
            url = entry.get("url") or entry["shard"]
            count = next(entry[name] for name in ("count", "nsamples", "num_samples") if name in entry)
            if int(count) < 0:
                raise ValueError(count)
            yield str(url), int(count), int(entry.get("bytes", 0)), str(entry.get("digest", ""))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise UserError(f'data.counts: {source} is no manifest: expected a list of {{"url", "count"}}') from None


def _stats_count(shard: str) -> int:
    path = shard.partition("?")[0].removesuffix(".tar") + "_stats.json"
    try:
        return int(json.loads(_read(path))["successes"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"data.counts: {path} is not img2dataset's statistics (no `successes`)") from None


def _read(path: str) -> str:
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.counts: {path} cannot be read: {error}") from None
