"""The losses of instruction tuning, as tasks of the adaptation objective.

    L = L_prompt + lambda * L_align

L_prompt is the captioning loss on [instruction, input, response], of which only the response and its end mark count.
L_align is the mean of ||e_i - e_j||^2 over pairs of instructions with the same meaning, where e, of unit length, is
what the text tower makes of an instruction: its embedding, or the state that the response goes on from. Both phrasings
of a pair lie in one sample, so that pairs are the same for any number of ranks and micro-batches. Which instructions of
a sample are taken is a function of (seed, position).
"""

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.adapt.instructions.answering import Answer, answer_scores, answer_split, distance_scores
from mmscale.adapt.instructions.records import Instruction, encode_prompt, encode_response, read_instructions
from mmscale.adapt.instructions.settings import InstructionSettings
from mmscale.adapt.objective import Encoded, masked_sum, pad_ids
from mmscale.data.batches import LabelledBatch
from mmscale.data.loader import EvalSet
from mmscale.data.tokenizer import Tokenizer
from mmscale.model.layers import Packing
from mmscale.model.modeling_mmscale import MMScaleModel


class _Drawn:
    """What both tasks have in common: the instructions that are drawn of each picture, the same for both."""

    def __init__(self, tokenizer: Tokenizer, settings: InstructionSettings, context_length: int, seed: int):
        self.tokenizer, self.settings, self.seed = tokenizer, settings, seed
        self.context_length = context_length

    def _meanings(self, batch: LabelledBatch) -> list[tuple[int, list[Instruction]]]:
        """(row, up to `per_meaning` phrasings of one meaning), up to `per_picture` meanings of every good row."""
        drawn = []
        for row in batch.valid.nonzero().flatten().tolist():
            meanings = draw(batch.records[row], self.seed, int(batch.positions[row]), self.settings.per_picture)
            drawn += [(row, phrasings[: self.settings.per_meaning]) for phrasings in meanings]
        return drawn

    def _prompt(self, instruction: Instruction) -> list[int]:
        return encode_prompt(self.tokenizer, self.settings.prompt, instruction.question, self.context_length)


class ResponseTask(_Drawn):
    """L_prompt: cross entropy of the response's tokens, summed."""

    name, weight = "prompt", 1.0
    answers: list[Answer]  # of the last evaluation

    def evaluate(self, model: MMScaleModel, split: EvalSet) -> dict[str, float]:
        """`answer_scores` and `distance_scores` of the answers that the model writes. Collective."""
        batch_size = self.settings.answer_batch
        self.answers = answer_split(model, self.tokenizer, split, self.settings.prompt, batch_size)
        distances = distance_scores(model, self.tokenizer, self.answers, batch_size)
        return answer_scores(self.answers) | distances

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """`input_ids` [texts, length] with their `rows` in the batch; `read`, the places of all tokens but each text's
        last; and among these `wanted` [targets], after which a response's token comes, one of `targets`."""
        rows, texts, starts = [], [], []
        for row, phrasings in self._meanings(batch):
            for instruction in phrasings:
                prompt = self._prompt(instruction)
                response = encode_response(self.tokenizer, instruction.response, len(prompt), self.context_length)
                rows.append(row)
                texts.append(prompt + response)
                starts.append(len(prompt))
        if not texts:  # every rank uses every parameter, whatever it has drawn
            rows, texts, starts = [0], [[self.tokenizer.start_id, self.tokenizer.end_id]], [2]
        input_ids, lengths = pad_ids(texts, self.tokenizer.pad_id)
        target = torch.arange(1, input_ids.shape[1])
        real = target < lengths[:, None]  # a text's last token predicts nothing
        predicts = real & (target >= torch.tensor(starts)[:, None])
        return {
            "rows": torch.tensor(rows),
            "input_ids": input_ids,
            "read": Packing.of(real).index,
            "wanted": predicts.flatten()[real.flatten()].nonzero().squeeze(1),
            "targets": input_ids[:, 1:][predicts],
            "count": predicts.sum(),
        }

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        input_ids = inputs["input_ids"][:, :-1]
        packing = Packing(inputs["read"], *input_ids.shape)
        _, text_tokens = model.text(input_ids, packing=packing)
        hidden = model.decoder(text_tokens, encoded.image_tokens[inputs["rows"]], packing=packing)
        return model.decoder.head(hidden[inputs["wanted"]], inputs["targets"])


class AlignmentTask(_Drawn):
    """L_align: squared distances between the embeddings of the two phrasings of each meaning, summed."""

    name = "align"

    def evaluate(self, model: MMScaleModel, split: EvalSet) -> dict[str, float]:
        """Nothing: the other task measures distances, whatever the weight of this one."""
        return {}

    @property
    def weight(self) -> float:
        return self.settings.align

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Prompts [2 * pairs, length], a pair's side by side; `real` [pairs] is False for a pair that fills up."""
        pairs = [phrasings for _, phrasings in self._meanings(batch) if len(phrasings) > 1]
        texts = [[*self._prompt(one), self.tokenizer.end_id] for pair in pairs for one in pair]
        real = torch.ones(max(len(pairs), 1), dtype=torch.bool)
        if not pairs:
            texts, real[0] = [[self.tokenizer.start_id, self.tokenizer.end_id]] * 2, False
        input_ids, lengths = pad_ids(texts, self.tokenizer.pad_id)
        return {"input_ids": input_ids, "lengths": lengths, "real": real, "count": real.sum()}

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        input_ids, lengths = inputs["input_ids"], inputs["lengths"]
        if self.settings.align_on == "embedding":
            embeds, _ = model.text(input_ids, lengths)
        else:  # the state of the last token before the end mark, from which the response goes on
            _, states = model.text(input_ids)
            embeds = states[torch.arange(len(states), device=states.device), lengths - 2]
        one, other = F.normalize(embeds, dim=-1).unflatten(0, (-1, 2)).unbind(1)
        return masked_sum((one - other).square().sum(1), inputs["real"])


def draw(record: dict, seed: int, position: int, number: int) -> list[list[Instruction]]:
    """Up to so many meanings of a sample, each with its phrasings in an order of chance; a function of the position."""
    meanings: dict[str, list[Instruction]] = {}
    for index, instruction in enumerate(read_instructions(record)):
        if not instruction.held_out:
            meanings.setdefault(instruction.meaning or f"entry {index}", []).append(instruction)
    rng = random.Random(f"{seed}/{position}")
    chosen = rng.sample(list(meanings.values()), min(number, len(meanings)))
    return [rng.sample(phrasings, len(phrasings)) for phrasings in chosen]
