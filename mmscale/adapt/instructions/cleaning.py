"""What is wrong with an instruction: alone, or beside the others of the same picture.

too short, too long    words of the instruction with its input, and of the response
another language       a plain test of the script: letters whose Unicode name does not begin with a wanted script
duplicate              the same picture, instruction and response, but for case, spaces and punctuation
near duplicate         the same picture and response, and instructions whose character trigrams overlap (Jaccard); two
                       phrasings of one meaning are meant to be alike and stay
contradiction          the same picture and instruction with different responses: nobody knows which is right, so all go
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from mmscale.adapt.instructions.records import Instruction
from mmscale.adapt.instructions.settings import CleaningSettings
from mmscale.evaluate.vqa import normalize_answer

NUM_EXAMPLES = 5


@dataclass
class Removed:
    """How many instructions were removed for each reason, and a few of each to look at."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)

    def add(self, reason: str, entry: "Entry") -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append({"key": entry.key, **entry.instruction.entry()})


@dataclass(frozen=True)
class Entry:
    """An instruction of the sample `number` of a shard."""

    shard: int
    number: int
    key: str
    instruction: Instruction


def clean(entries: list[Entry], settings: CleaningSettings, removed: Removed) -> list[Entry]:
    """What remains of all instructions about one picture, in their order."""
    entries = _without(entries, lambda one: _fault(one, settings), removed)
    seen: set[tuple[str, str]] = set()

    def repeated(one: Instruction) -> str | None:
        known = (_plain(one.question), normalize_answer(one.response))
        return "duplicate" if known in seen or seen.add(known) else None

    entries = _without(entries, repeated, removed)
    responses = Counter(question for question, _ in seen)

    def contradicted(one: Instruction) -> str | None:
        open_ended = one.task in settings.open_tasks
        return "contradiction" if responses[_plain(one.question)] > 1 and not open_ended else None

    entries = _without(entries, contradicted, removed)
    kept: dict[str, list[tuple[Instruction, set[str]]]] = {}

    def much_alike(one: Instruction) -> str | None:
        trigrams, others = _trigrams(_plain(one.question)), kept.setdefault(normalize_answer(one.response), [])
        for other, known in others:
            same_meaning = one.meaning and one.meaning == other.meaning
            if not same_meaning and jaccard(trigrams, known) >= settings.near_duplicate:
                return "near duplicate"
        others.append((one, trigrams))
        return None

    return _without(entries, much_alike, removed)


def jaccard(one: set, other: set) -> float:
    """Shared elements over all elements; 1 for two empty sets."""
    return len(one & other) / len(one | other) if one or other else 1.0


def script_share(text: str, scripts: list[str]) -> float:
    """The share of a text's letters whose Unicode names begin with one of the scripts; 1 without letters."""
    letters = [letter for letter in text if letter.isalpha()]
    wanted = tuple(script.upper() for script in scripts)
    return sum(unicodedata.name(letter, "").startswith(wanted) for letter in letters) / max(len(letters), 1) or float(
        not letters
    )


def _fault(one: Instruction, settings: CleaningSettings) -> str | None:
    words, answer_words = len(one.question.split()), len(one.response.split())
    if words < settings.min_words:
        return "too short"
    if words > settings.max_words or answer_words > settings.max_response_words:
        return "too long"
    if script_share(f"{one.question} {one.response}", settings.scripts) < settings.min_script:
        return "another language"
    return None


def _without(entries: list[Entry], fault: Callable[[Instruction], str | None], removed: Removed) -> list[Entry]:
    kept = []
    for entry in entries:
        reason = fault(entry.instruction)
        if reason is None:
            kept.append(entry)
        else:
            removed.add(reason, entry)
    return kept


def _plain(text: str) -> str:
    """Lower case, compatible characters made one, words by single spaces, without punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _trigrams(text: str) -> set[str]:
    return {text[start : start + 3] for start in range(max(len(text) - 2, 1))}
