"""Answers written by the model, and how many are right: per task, seen and unseen phrasings apart."""

from collections.abc import Iterator
from dataclasses import dataclass

from mmscale.adapt.instructions.clusters import embed_texts, meaning_distances
from mmscale.adapt.instructions.records import Instruction, read_instructions
from mmscale.data.loader import EvalSet
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.captioning import exact_match, generate_captions
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.ranks import gather_lists, max_over_ranks
from mmscale.model.modeling_mmscale import MMScaleModel

MAX_EMBEDDED = 1000  # texts whose distances are measured


@dataclass
class Answer:
    """An instruction, and what the model wrote."""

    position: int
    key: str
    asked: Instruction
    written: str

    @property
    def right(self) -> bool:
        return exact_match(self.written, [self.asked.response])


def answer_split(
    model: MMScaleModel, tokenizer: Tokenizer, split: EvalSet, prompt: str, batch_size: int
) -> list[Answer]:
    """Every instruction of a split, answered; those of all ranks, in the order of the split. Collective."""
    device = model_device(model)
    answers: list[Answer] = []
    for batch in split:
        asked = [
            (row, one)
            for row in batch.valid.nonzero().flatten().tolist()
            for one in read_instructions(batch.records[row])
        ]
        pixel_values = batch.pixel_values.to(device)
        _, image_tokens = model.encode_image(pixel_values)
        for start in range(0, max_over_ranks(len(asked), device), batch_size):
            part = asked[start : start + batch_size]
            rows = [row for row, _ in part] or [0]
            prompts = [prompt.replace("{}", one.question) for _, one in part] or [""]
            written = generate_captions(
                model, tokenizer, pixel_values[rows], prompts=prompts, image_tokens=image_tokens[rows]
            )
            answers += [
                Answer(int(batch.positions[row]), batch.keys[row], one, text)
                for (row, one), text in zip(part, written, strict=False)
            ]
    return sorted(gather_lists(answers), key=lambda answer: answer.position)


def answer_scores(answers: list[Answer]) -> dict[str, float]:
    """Shares answered word for word right. `seen` and `unseen` are means over tasks, so that each counts alike;
    `gap` is what unseen phrasings cost; `seen_count`, `unseen_count` and so on are the tasks' own. Raises UserError."""
    if not answers:
        raise UserError("no sample of the split holds an instruction; `build_instructions` makes such shards")
    scores: dict[str, float] = {}
    for name, held_out in (("seen", False), ("unseen", True)):
        tasks = {task: list(own) for task, own in _by_task(answers, held_out)}
        if tasks:
            shares = {task: sum(answer.right for answer in own) / len(own) for task, own in tasks.items()}
            scores[name] = sum(shares.values()) / len(shares)
            scores |= {f"{name}_{task or 'unnamed'}": share for task, share in shares.items()}
    if "seen" in scores and "unseen" in scores:
        scores["gap"] = scores["seen"] - scores["unseen"]
    return scores


def distance_scores(model: MMScaleModel, tokenizer: Tokenizer, answers: list[Answer], batch_size: int) -> dict:
    """How far apart instructions of the same and of other meanings are embedded; nothing where no two share one."""
    meaning_of = {answer.asked.question: answer.asked.meaning for answer in answers if answer.asked.meaning}
    texts = sorted(meaning_of, key=lambda text: (meaning_of[text], text))[:MAX_EMBEDDED]
    if not texts:
        return {}
    embeds = embed_texts(model, tokenizer, texts, batch_size)
    distances = meaning_distances(embeds, [meaning_of[text] for text in texts])
    return {f"distance_{name}": value for name, value in distances.items()}


def _by_task(answers: list[Answer], held_out: bool) -> Iterator[tuple[str, list[Answer]]]:
    for task in sorted({answer.asked.task for answer in answers}):
        own = [answer for answer in answers if answer.asked.task == task and answer.asked.held_out == held_out]
        if own:
            yield task, own
