"""The classes of a task: where a sample says its own, and the words for them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.labels import Label, train_records
from mmscale.config import Paths
from mmscale.errors import UserError

MAX_CLASSES = 10_000


class Classes:
    """The classes of a task: where a sample says its own, their names in the data, and the words for them.

    Args:
        label: JMESPath of the class in a sample's JSON. A list of texts there names the class by the one entry that is
            among the names.
        words: class name -> words that may stand for it, the first by hand.
    """

    def __init__(self, label: str, words: dict[str, list[str]]):
        self.label = Label(label, "adapt.prompts.label")
        self.words = words
        self.names = list(words)
        self._number = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def first_words(self) -> list[str]:
        """The word of each class by hand."""
        return [own[0] for own in self.words.values()]

    def of(self, record: dict) -> int:
        """The number of a sample's class; -1 when it has none of these."""
        several = self.label.several(record)
        if several is not None:
            found = [self._number[name] for name in several if name in self._number]
            return found[0] if len(found) == 1 else -1
        return self._number.get(self.label.one(record), -1)

    def targets(self, records: Sequence[dict]) -> Tensor:
        return torch.tensor([self.of(record) for record in records])


def find_classes(config: AdaptConfig, label: str, given: list[str] | dict[str, Paths] | None, key: str) -> Classes:
    """The classes as the settings name them, or all those of the training data. Raises UserError."""
    if isinstance(given, dict):
        words = {name: [own] if isinstance(own, str) else own for name, own in given.items()}
    elif given is not None:
        words = {name: [name] for name in given}
    else:
        where = Label(label, f"{key}.label")
        found = {name for _, record in train_records(config.data) if (name := where.one(record)) is not None}
        words = {name: [name] for name in sorted(found)}
    if not 2 <= len(words) <= MAX_CLASSES or not all(words.values()):
        raise UserError(f"{key}.classes: {len(words)} classes found by `{label}`; name at least two, each with a word")
    return Classes(label, words)
