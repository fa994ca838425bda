"""The ways of asking for a fact: a table of templates, some of which are held out from training."""

import random
import string
from dataclasses import dataclass
from pathlib import Path

import yaml

from mmscale.adapt.instructions.facts import Fact
from mmscale.errors import UserError

BUILT_IN = Path(__file__).with_name("phrasings.yaml")


@dataclass(frozen=True)
class Phrasing:
    """One way of asking. `number` counts a task's phrasings, those of training first."""

    template: str
    number: int
    held_out: bool

    def ask(self, fact: Fact) -> str:
        return self.template.format_map(dict(fact.slots))


class Phrasings:
    """The phrasings of every task: the built-in ones, and over them those of a user's file.

    Raises:
        UserError: the file is not a table of `task: {train: [...], held_out: [...]}`.
    """

    def __init__(self, path: str | None = None):
        self._table = _read(BUILT_IN)
        if path is not None:
            self._table |= _read(Path(path))

    def __getitem__(self, task: str) -> list[Phrasing]:
        return self._table[task]

    def tasks(self) -> list[str]:
        return list(self._table)

    def choose(self, fact: Fact, number: int, rng: random.Random, *, held_out: bool) -> list[Phrasing]:
        """Up to so many different ones of a fact's task."""
        candidates = [phrasing for phrasing in self._table[fact.task] if phrasing.held_out == held_out]
        return rng.sample(candidates, min(number, len(candidates)))

    def check(self, fact: Fact) -> None:
        """Raises UserError where a fact lacks what a phrasing of its task has a slot for."""
        known = {name for name, _ in fact.slots}
        for phrasing in self._table[fact.task]:
            if missing := _slots(phrasing.template) - known:
                raise UserError(
                    f"phrasings of `{fact.task}`: {phrasing.template!r} has a slot {{{min(missing)}}}; "
                    f"known here: {', '.join(sorted(known)) or 'none'}"
                )


def _read(path: Path) -> dict[str, list[Phrasing]]:
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as a table of phrasings: {reason}") from None
    return {task: _phrasings(path, task, entry) for task, entry in (table or {}).items()}


def _phrasings(path: Path, task: str, entry: object) -> list[Phrasing]:
    entry = entry if isinstance(entry, dict) else {}
    train, held_out = entry.get("train"), entry.get("held_out", [])
    lists = isinstance(train, list) and isinstance(held_out, list) and train
    if not lists or set(entry) - {"train", "held_out"} or not all(isinstance(t, str) for t in [*train, *held_out]):
        raise UserError(f"{path}: `{task}`: expected lists of texts, `train` and (if any) `held_out`")
    if both := set(train) & set(held_out):
        raise UserError(f"{path}: `{task}`: {min(both)!r} is both in `train` and in `held_out`")
    for template in (*train, *held_out):
        try:
            _slots(template)
        except ValueError as error:
            raise UserError(f"{path}: `{task}`: {template!r}: {error}") from None
    return [Phrasing(text, number, number >= len(train)) for number, text in enumerate([*train, *held_out])]


def _slots(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
