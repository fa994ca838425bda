"""Instructions in the JSON of samples, and how they become tokens.

A sample holds one instruction, `{"instruction": ..., "input": ..., "response": ..., "task": ...}`, or several about the
same picture, as a list of such objects in `instructions`. Beside these, an entry may hold `meaning` (the same for
whatever asks the same; two of them in one sample are a pair to align) and `held_out` (a phrasing not to be trained on).
"""

from dataclasses import asdict, dataclass

from mmscale.data.tokenizer import Tokenizer
from mmscale.evaluate.captioning import ANSWER_ROOM


@dataclass(frozen=True)
class Instruction:
    """One instruction about a picture, and the right response."""

    instruction: str
    response: str
    input: str = ""
    task: str = ""
    meaning: str = ""
    held_out: bool = False

    @property
    def question(self) -> str:
        """The instruction with its input, as a prompt asks it."""
        return f"{self.instruction} {self.input}".strip()

    def entry(self) -> dict:
        """As the JSON holds it."""
        return {name: value for name, value in asdict(self).items() if value not in ("", False) or name == "input"}


def read_instructions(record: dict) -> list[Instruction]:
    """The instructions of a sample's JSON; entries without an instruction or a response are left out."""
    entries = record.get("instructions")
    found = []
    for entry in entries if isinstance(entries, list) else [record]:
        if isinstance(entry, dict) and _is_text(entry.get("instruction")) and _is_text(entry.get("response")):
            texts = {name: entry[name] for name in ("input", "task", "meaning") if isinstance(entry.get(name), str)}
            held_out = entry.get("held_out") is True
            found.append(Instruction(entry["instruction"], entry["response"], **texts, held_out=held_out))
    return found


def encode_prompt(tokenizer: Tokenizer, prompt: str, question: str, context_length: int) -> list[int]:
    """Start mark and prompt, cut as `generate_captions` cuts it, so that what is trained is what is asked later."""
    longest = context_length - min(ANSWER_ROOM, context_length // 2)
    return tokenizer.encode(prompt.replace("{}", question), longest + 1)[:-1]


def encode_response(tokenizer: Tokenizer, response: str, prompt_length: int, context_length: int) -> list[int]:
    """The response's tokens and the end mark, cut to the room that the prompt leaves."""
    return tokenizer.encode(response, context_length - prompt_length + 1)[1:]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
