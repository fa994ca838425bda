"""The right answers in a sample's JSON, and the splits that must never mix."""

from collections.abc import Iterator
from typing import Any

import jmespath
from jmespath.exceptions import JMESPathError

from mmscale.config import DataConfig, Paths
from mmscale.data.captions import SampleError
from mmscale.data.paths import expand
from mmscale.data.shards import Shards
from mmscale.data.sources import train_shards
from mmscale.errors import UserError


class Label:
    """Where an answer is found, as a JMESPath expression (https://jmespath.org): `class_name`, `objects[0].color`,
    `length(objects)`, `objects[*].shape`."""

    def __init__(self, expression: str, key: str):
        try:
            self._path = jmespath.compile(expression)
        except JMESPathError as error:
            raise UserError(f"{key}: `{expression}` is not a JMESPath expression: {_one_line(error)}") from None

    def of(self, record: dict) -> Any:
        """The answer; None where a sample has none."""
        try:
            return self._path.search(record)
        except JMESPathError:  # such as the length of something that is not there
            return None

    def one(self, record: dict) -> str | None:
        """As the name of a class."""
        value = self.of(record)
        return None if value is None or isinstance(value, dict | list) else _name(value)

    def several(self, record: dict) -> list[str] | None:
        """As the names of all classes that are there."""
        value = self.of(record)
        return sorted({_name(item) for item in value}) if isinstance(value, list) else None

    def number(self, record: dict) -> float | None:
        value = self.of(record)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def train_records(data: DataConfig) -> Iterator[tuple[int, dict]]:
    """(number of the source, JSON) of every sample to train on, in the order of the shards."""
    for source, paths in enumerate(train_shards(data)[0]):
        for record in records(paths, data):
            yield source, record


def records(paths: Paths, data: DataConfig) -> Iterator[dict]:
    """The JSON of every usable sample."""
    shards = Shards(expand(paths), data)
    for shard, count in enumerate(shards.counts):
        for number in range(count):
            try:
                yield shards.read(shard, number, with_record=True, with_image=False).record
            except SampleError:
                continue
    shards.close()


def check_splits(data: DataConfig) -> None:
    """Raises UserError when a shard, under whatever name, is in two of train, val and test."""
    splits = {"data.train": [path for group in train_shards(data)[0] for path in group]}
    for key in ("val", "test"):
        if (paths := getattr(data, key)) is not None:
            splits[f"data.{key}"] = expand(paths, f"data.{key}")
    seen: dict[str, tuple[str, str]] = {}
    for split, paths in splits.items():
        shards = Shards(paths, data)
        for path, digest in zip(shards.paths, shards.digests, strict=True):
            owner, other = seen.setdefault(str(digest), (split, path))
            if owner != split:
                raise UserError(f"{split}: {path} holds the same samples as {other} of {owner}; splits must not mix")
        shards.close()


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
