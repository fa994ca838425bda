"""Which samples were masked: each is logged once, however many epochs meet it, and the worst shard can be named."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from mmscale.train.folder import RunFolder

FILE = "bad_samples.jsonl"


class BadSamples:
    """The lines of bad_samples.jsonl. What they say is known again when the run goes on.

    by_shard: masked slots of each shard; those of before a resume count once a sample.
    """

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._logged: set[tuple[str, ...]] = set()
        self.by_shard: Counter[str] = Counter()

    def restore(self) -> None:
        """Takes over what the file holds, on the rank that writes it."""
        path = self._folder.path / FILE
        if self._folder.writes and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                facts = json.loads(line)
                self._logged.add(_identity(facts))
                self.by_shard[facts["shard"]] += 1

    def add(self, bad: Iterable[Any]) -> None:
        """`bad`: mmscale.data.loader.BadSample, in the order of their positions."""
        for sample in bad:
            facts = {"position": sample.position, "shard": sample.shard, "key": sample.key, "reason": sample.reason}
            self.by_shard[sample.shard] += 1
            if (identity := _identity(facts)) not in self._logged:
                self._logged.add(identity)
                self._folder.append(FILE, facts)

    def worst_shard(self) -> str:
        """In words: the shard that most masked slots come from."""
        [(shard, count)] = self.by_shard.most_common(1)
        return f"{shard} with {count} of them"


def _identity(facts: dict[str, Any]) -> tuple[str, ...]:
    # The reason belongs to it: the key of a shard that cannot be read is not known.
    return facts["shard"], facts["key"], facts["reason"]
