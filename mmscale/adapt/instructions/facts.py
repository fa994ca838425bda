"""What a sample's JSON states, as facts that can be asked for.

A fact is a task, the words that fill the slots of its phrasings, and the response. Where it comes from is a setting;
each kind reads what its field holds and gives nothing where that is missing:

    captions   the first of `captions`, else of the caption's own field: describe
    classes    `class_name`: classify, and is_class (yes or no)
    questions  `question` and `answers`, or a list of such objects in `questions`, as the evaluation `vqa` reads them
    objects    `objects`, a list of things with a noun, attributes and a `box` [left, top, right, bottom] in pixels:
               count, attribute, presence, relation, neighbour, side, place
    fields     any field of text, or list of texts, by name: field, and listed (yes or no)
    facts      `facts`, a list of {"task": ..., "slots": {...}, "response": ..., "input": ...}, for your own phrasings

Yes and no come up equally often. What is not there is drawn from the words that the training split knows.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from mmscale.adapt.instructions.settings import FactSettings
from mmscale.adapt.instructions.words import number_word, plural, with_article
from mmscale.evaluate.vqa import read_questions

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ABSENT_COUNTS = 6  # one count in so many asks for what is not there


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked. `slots` fill the braces of a phrasing; `input` is what the instruction is about."""

    task: str
    slots: tuple[tuple[str, str], ...]
    response: str
    input: str = ""

    @property
    def meaning(self) -> str:
        """The same for whatever asks the same, in any words and of any picture."""
        return blake2b(repr((self.task, self.slots, self.input)).encode(), digest_size=6).hexdigest()


@dataclass
class Vocabulary:
    """What occurs in the training split: classes, values of list fields, kinds of things and their attributes."""

    classes: Counter = field(default_factory=Counter)
    listed: dict[str, Counter] = field(default_factory=dict)
    nouns: Counter = field(default_factory=Counter)
    values: dict[str, Counter] = field(default_factory=dict)

    def add(self, record: dict, settings: FactSettings) -> None:
        if isinstance(record.get("class_name"), str):
            self.classes[record["class_name"]] += 1
        for name in settings.fields:
            if isinstance(record.get(name), list):
                self.listed.setdefault(name, Counter()).update(_texts(record[name]))
        for thing in read_things(record, settings):
            self.nouns[thing.noun] += 1
            for attribute, value in thing.attributes.items():
                self.values.setdefault(attribute, Counter())[value] += 1


@dataclass(frozen=True)
class Thing:
    """One entry of `objects`."""

    noun: str
    attributes: dict[str, str]
    box: tuple[float, float, float, float] | None


def read_things(record: dict, settings: FactSettings) -> list[Thing]:
    """The entries of `objects` that have a noun; a box that is not four numbers is left out."""
    found = []
    for entry in record.get("objects") if isinstance(record.get("objects"), list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get(settings.noun), str):
            continue
        attributes = {name: entry[name] for name in settings.attributes if isinstance(entry.get(name), str)}
        box = entry.get("box")
        whole = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, (int, float)) for edge in box)
        found.append(Thing(entry[settings.noun], attributes, tuple(box) if whole else None))
    return found


def facts_of(
    record: dict, captions: list[str], settings: FactSettings, vocabulary: Vocabulary, rng: random.Random
) -> list[Fact]:
    """The facts of one sample, of each task at most as many as the settings say, in an order that `rng` draws."""
    found: list[Fact] = []
    for kind in settings.kinds:
        if kind != "instructions":  # those are instructions already
            found += _KINDS[kind](record, captions, settings, vocabulary, rng)
    by_task: dict[str, list[Fact]] = {}
    for fact in dict.fromkeys(found):
        by_task.setdefault(fact.task, []).append(fact)
    limits = {task: settings.per_task_of.get(task, settings.per_task) for task in by_task}
    return [fact for task, facts in by_task.items() for fact in _chosen(facts, limits[task], rng)]


def _chosen(facts: list[Fact], number: int, rng: random.Random) -> list[Fact]:
    """So many of the facts; responses take turns, so that rare ones come up as often as frequent ones."""
    groups: dict[str, list[Fact]] = {}
    for fact in rng.sample(facts, len(facts)):
        groups.setdefault(fact.response, []).append(fact)
    turns = [fact for turn in range(max(map(len, groups.values()))) for fact in _turn(groups, turn, rng)]
    return turns[:number]


def _turn(groups: dict[str, list[Fact]], turn: int, rng: random.Random) -> list[Fact]:
    own = [facts[turn] for facts in groups.values() if turn < len(facts)]
    return rng.sample(own, len(own))


def _describe(record, captions, settings, vocabulary, rng) -> Iterator[Fact]:
    listed = record.get("captions")
    stated = [*_texts(listed if isinstance(listed, list) else []), *captions]
    if stated:
        yield Fact("describe", (), stated[0])


def _classes(record, captions, settings, vocabulary, rng) -> Iterator[Fact]:
    name = record.get("class_name")
    if not isinstance(name, str):
        return
    yield Fact("classify", (), name)
    yield Fact("is_class", _noun_slots(name), "yes")
    if other := _other(vocabulary.classes, {name}, rng):
        yield Fact("is_class", _noun_slots(other), "no")


def _questions(record, captions, settings, vocabulary, rng) -> Iterator[Fact]:
    for asked in read_questions(record, 0, ""):
        answer, _ = Counter(asked.answers).most_common(1)[0]
        yield Fact("question", (), answer, asked.question)


def _fields(record, captions, settings, vocabulary, rng) -> Iterator[Fact]:
    for name, word in settings.fields.items():
        value = record.get(name)
        if isinstance(value, str) and value:
            yield Fact("field", (("field", word),), value)
        elif isinstance(value, list) and (texts := _texts(value)):
            own = rng.choice(texts)
            yield Fact("listed", (("field", word), ("value", own)), "yes")
            if other := _other(vocabulary.listed.get(name, Counter()), set(texts), rng):
                yield Fact("listed", (("field", word), ("value", other)), "no")


def _given(record, captions, settings, vocabulary, rng) -> Iterator[Fact]:
    for entry in record.get("facts") if isinstance(record.get("facts"), list) else []:
        slots, about = entry.get("slots", {}), entry.get("input", "")
        texts = [entry.get("task"), entry.get("response"), about, *slots.values()]
        if all(isinstance(text, str) for text in texts):
            yield Fact(entry["task"], tuple(sorted(slots.items())), entry["response"], about)


def _objects(record, captions, settings, vocabulary, rng) -> Iterator[Fact]:
    things = read_things(record, settings)
    if not things:
        return
    names = _names(things, settings)
    absent = _absent_names(things, settings, vocabulary, rng)
    yield from _counts(names, absent, rng)
    yield from _attributes(things, names, settings)
    for name in names:
        yield Fact("presence", _noun_slots(name), "yes")
    for name in absent:
        yield Fact("presence", _noun_slots(name), "no")
    yield from _relations(things, names, absent, settings, rng)
    if isinstance(record.get("width"), int) and isinstance(record.get("height"), int):
        yield from _sides(things, names, record["width"], record["height"])


def _names(things: list[Thing], settings: FactSettings) -> dict[str, list[int]]:
    """What things may be called -> the things so called: the noun, with one attribute, with all of them."""
    names: dict[str, list[int]] = {}
    for number, thing in enumerate(things):
        order = [name for name in settings.attributes if name in thing.attributes]
        for some in {(), *((name,) for name in order), tuple(order)}:
            names.setdefault(" ".join([*(thing.attributes[name] for name in some), thing.noun]), []).append(number)
    return dict(sorted(names.items()))


def _absent_names(things, settings, vocabulary, rng) -> list[str]:
    """Names of things that are not there, each one word away from one that is."""
    present = set(_names(things, settings))
    found = []
    for thing in things:
        for some in ((), *((name,) for name in thing.attributes)):
            noun, values = thing.noun, {name: thing.attributes[name] for name in some}
            changed = rng.choice(["", *some])
            if changed:
                values[changed] = _other(vocabulary.values.get(changed, Counter()), {values[changed]}, rng) or ""
            else:
                noun = _other(vocabulary.nouns, {noun}, rng) or ""
            name = " ".join([*values.values(), noun])
            if noun and all(values.values()) and name not in present:
                found.append(name)
    return list(dict.fromkeys(found))


def _counts(names: dict[str, list[int]], absent: list[str], rng: random.Random) -> Iterator[Fact]:
    for name, things in names.items():
        yield Fact("count", _noun_slots(name), number_word(len(things)))
    if absent and rng.randrange(ABSENT_COUNTS) == 0:
        yield Fact("count", _noun_slots(rng.choice(absent)), number_word(0))


def _attributes(things: list[Thing], names: dict[str, list[int]], settings: FactSettings) -> Iterator[Fact]:
    for name, numbers in names.items():
        for attribute, word in settings.attributes.items():
            values = {things[number].attributes.get(attribute) for number in numbers}
            value = values.pop()
            if not values and value is not None and value not in name.split():
                yield Fact("attribute", (("attribute", word), *_definite(name, len(numbers))), value)


def _relations(things, names, absent, settings, rng) -> Iterator[Fact]:
    """Between two names: yes where all that is so called lies wholly on that side, no where it is the other way."""
    groups = sorted({tuple(numbers) for numbers in names.values()})
    for first in groups:
        for second in groups:
            relation = _relation([things[i] for i in first], [things[i] for i in second])
            if set(first) & set(second) or relation is None:
                continue
            a, b = (rng.choice([name for name in names if tuple(names[name]) == own]) for own in (first, second))
            yield _related(a, relation, b, "yes")
            yield _related(a, OPPOSITE[relation], b, "no")
            if absent and rng.randrange(3) == 0:
                yield _related(
                    *rng.choice([(a, relation, rng.choice(absent)), (rng.choice(absent), relation, b)]), "no"
                )
            slots = (("relation", relation), *_definite(b, len(second)))
            if set(first) | set(second) == set(range(len(things))) and len({things[i].noun for i in first}) == 1:
                yield Fact("neighbour", slots, things[first[0]].noun)
                yield Fact("neighbour", (("relation", OPPOSITE[relation]), *slots[1:]), "nothing")


def _related(first: str, relation: str, second: str, response: str) -> Fact:
    slots = (("first", with_article(first)), ("second", with_article(second)), ("relation", relation))
    return Fact("relation", slots, response)


def _relation(first: list[Thing], second: list[Thing]) -> str | None:
    """How all of the first stand to all of the second; None where that is not so for all, or in two ways at once."""
    if any(thing.box is None for thing in (*first, *second)):
        return None
    found = []
    for low, high, before, after in ((0, 2, "left of", "right of"), (1, 3, "above", "below")):
        if max(thing.box[high] for thing in first) <= min(thing.box[low] for thing in second):
            found.append(before)
        if max(thing.box[high] for thing in second) <= min(thing.box[low] for thing in first):
            found.append(after)
    return found[0] if len(found) == 1 else None


def _sides(things: list[Thing], names: dict[str, list[int]], width: int, height: int) -> Iterator[Fact]:
    for name, numbers in names.items():
        boxes = [things[number].box for number in numbers]
        if any(box is None for box in boxes):
            continue
        halves = []
        for low, high, size, (before, after) in ((1, 3, height, ("top", "bottom")), (0, 2, width, ("left", "right"))):
            first = all(box[high] <= size / 2 for box in boxes)
            if first or all(box[low] >= size / 2 for box in boxes):
                halves.append(before if first else after)
                yield Fact("side", (("sides", f"{before} or {after}"), *_definite(name, len(numbers))), halves[-1])
        if len(halves) == 2:
            yield Fact("place", _definite(name, len(numbers)), " ".join(halves))


def _noun_slots(name: str) -> tuple[tuple[str, str], ...]:
    return (("thing", name), ("a_thing", with_article(name)), ("things", plural(name)))


def _definite(name: str, number: int) -> tuple[tuple[str, str], ...]:
    if number == 1:
        return (("the_thing", f"the {name}"), ("is", "is"), ("it", "it"), ("them", "it"))
    return (("the_thing", f"the {plural(name)}"), ("is", "are"), ("it", "they"), ("them", "them"))


def _other(known: Counter, own: set[str], rng: random.Random) -> str | None:
    others = sorted(set(known) - own)
    return rng.choice(others) if others else None


def _texts(values: Iterable) -> list[str]:
    return [value for value in values if isinstance(value, str) and value]


_KINDS: dict[str, Callable[..., Iterator[Fact]]] = {
    "captions": _describe,
    "classes": _classes,
    "questions": _questions,
    "objects": _objects,
    "fields": _fields,
    "facts": _given,
}
