"""Questions about pictures: the question is the prompt, the answer is written, or chosen by likelihood.

A sample's JSON asks one question (`question`, `answers`, `candidates`) or several (`questions`, a list of such
objects). `answers` are what people said, one each, as texts or as objects with an `answer`; `candidates`, if there are
some, are what to choose from.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmscale.config import EvalConfig
from mmscale.data.loader import EvalBatch
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.captioning import generate_captions
from mmscale.evaluate.encoding import pad_tokens
from mmscale.evaluate.ranks import gather_lists, max_over_ranks
from mmscale.model.modeling_mmscale import MMScaleModel

ENOUGH = 3  # people who gave an answer for it to be wholly right
_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))  # noqa: SIM905


@dataclass
class Question:
    """One question, what people answered, and what the model did."""

    position: int
    key: str
    question: str
    answers: list[str]
    candidates: list[str]
    answer: str = ""

    @property
    def accuracy(self) -> float:
        return vqa_accuracy(self.answer, self.answers)


class QuestionAnswering:
    """The task in an evaluation. After `finish`, `questions` holds every rank's, in the order of the split."""

    def __init__(self, model: MMScaleModel, tokenizer: Tokenizer, config: EvalConfig):
        if not model.config.decoder_config.layers:
            raise UserError("this model has no decoder, so it cannot answer questions: leave the task `vqa` out")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.questions: list[Question] = []

    def add(self, batch: EvalBatch, pixel_values: Tensor, image_embeds: Tensor, image_tokens: Tensor) -> None:
        """Answers the questions of one batch. Collective: all ranks make as many passes as the one with the most."""
        asked = [
            (row, question)
            for row in batch.valid.nonzero().flatten().tolist()
            for question in read_questions(batch.records[row], int(batch.positions[row]), batch.keys[row])
        ]
        chosen = [(row, question) for row, question in asked if question.candidates]
        written = [(row, question) for row, question in asked if not question.candidates]
        self._write(written, pixel_values, image_tokens)
        self._choose(chosen, image_tokens)
        self.questions += [question for _, question in asked]

    def finish(self) -> dict[str, float]:
        """`vqa_accuracy` and `vqa_questions` over all ranks; empty when nobody asked anything. Collective."""
        self.questions = sorted(gather_lists(self.questions), key=lambda question: question.position)
        if not self.questions:
            return {}
        total = sum(question.accuracy for question in self.questions)
        return {"vqa_questions": len(self.questions), "vqa_accuracy": total / len(self.questions)}

    def _prompt(self, question: Question) -> str:
        return self.config.vqa_prompt.replace("{}", question.question)

    def _write(self, asked: list[tuple[int, Question]], pixel_values: Tensor, image_tokens: Tensor) -> None:
        size, device = self.config.batch, pixel_values.device
        for number in range(max_over_ranks(-(-len(asked) // size), device)):
            part = asked[number * size : (number + 1) * size]
            rows = [row for row, _ in part] or [0]
            prompts = [self._prompt(question) for _, question in part] or [""]
            answers = generate_captions(
                self.model, self.tokenizer, pixel_values[rows], prompts=prompts, image_tokens=image_tokens[rows]
            )
            for (_, question), answer in zip(part, answers, strict=False):
                question.answer = answer

    def _choose(self, asked: list[tuple[int, Question]], image_tokens: Tensor) -> None:
        pairs = [
            (row, self._prompt(question), candidate) for row, question in asked for candidate in question.candidates
        ]
        scores = self._log_likelihoods(pairs, image_tokens)
        for _, question in asked:
            own, scores = scores[: len(question.candidates)], scores[len(question.candidates) :]
            question.answer = question.candidates[max(range(len(own)), key=own.__getitem__)]

    def _log_likelihoods(self, pairs: list[tuple[int, str, str]], image_tokens: Tensor) -> list[float]:
        """The log-probability of each answer and its end mark, summed over tokens, given its picture and prompt."""
        size, device = self.config.batch, image_tokens.device
        scores: list[float] = []
        for number in range(max_over_ranks(-(-len(pairs) // size), device)):
            part = pairs[number * size : (number + 1) * size]
            answers = [self._answer_tokens(prompt, answer) for _, prompt, answer in part or [(0, "", "")]]
            rows = [row for row, _, _ in part] or [0]
            context_length = self.model.config.text_config.context_length
            input_ids, lengths = pad_tokens([ids for ids, _ in answers], self.tokenizer.pad_id, context_length)
            input_ids, lengths = input_ids.to(device), lengths.to(device)
            _, text_tokens = self.model.encode_text(input_ids, lengths=lengths)
            logits = self.model.decoder.head(self.model.decode(text_tokens, image_tokens[rows]))
            logs = -F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
            target = torch.arange(1, input_ids.shape[1], device=device)
            first = torch.tensor([start for _, start in answers], device=device)[:, None]
            counted = (target >= first) & (target < lengths[:, None])
            scores += (logs.view(counted.shape) * counted).sum(1).tolist()[: len(part)]
        return scores

    def _answer_tokens(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """The tokens of prompt and answer, and where the answer begins."""
        context_length = self.model.config.text_config.context_length
        ids = self.tokenizer.encode(f"{prompt} {answer}", context_length)
        asked = self.tokenizer.encode(prompt, context_length)[:-1]
        same = (left == right for left, right in zip(ids, asked, strict=False))
        return ids, next((place for place, equal in enumerate(same) if not equal), min(len(ids) - 1, len(asked)))


def read_questions(record: dict, position: int, key: str) -> list[Question]:
    """The questions of a sample's JSON; none when it asks nothing or nobody answered."""
    asked = record.get("questions") if isinstance(record.get("questions"), list) else [record]
    found = []
    for entry in asked:
        if isinstance(entry, dict) and isinstance(entry.get("question"), str):
            answers = _texts(entry.get("answers") or entry.get("answer"))
            if answers:
                found.append(Question(position, key, entry["question"], answers, _texts(entry.get("candidates"))))
    return found


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """min(people who said so / 3, 1), averaged over leaving out each of them in turn (Antol et al. 2015).

    With fewer than three answers, one who said so is enough.
    """
    given = normalize_answer(answer)
    agreeing = [normalize_answer(other) == given for other in answers]
    if len(agreeing) < ENOUGH:
        return float(any(agreeing))
    return sum(min((sum(agreeing) - own) / ENOUGH, 1.0) for own in agreeing) / len(agreeing)


def normalize_answer(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers up to ten as digits."""
    words = re.sub(r"[^\w\s'.:]|(?<!\d)[.:]|[.:](?!\d)", " ", answer.lower()).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in values]
    return [text for text in texts if isinstance(text, str)]
