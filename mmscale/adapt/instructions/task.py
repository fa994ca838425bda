"""The losses of instruction tuning, as tasks of the adaptation objective.

    L = L_prompt + lambda * L_align

L_prompt is the captioning loss on [instruction, input, response], of which only the response and its end mark count.
L_align is the mean of ||e_i - e_j||^2 over pairs of instructions with the same meaning, where e is the text tower's
embedding, of unit length. Both phrasings of a pair lie in one sample, so that pairs are the same for any number of
ranks and micro-batches. Which instructions of a sample are taken is a function of (seed, position).
"""

import random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.adapt.instructions.records import Instruction, encode_prompt, encode_response, read_instructions
from mmscale.adapt.instructions.settings import InstructionSettings
from mmscale.data.tokenizer import Tokenizer
from mmscale.evaluate.encoding import pad_tokens
from mmscale.model.layers import Packing
from mmscale.model.modeling_mmscale import MMScaleModel


class _Drawn:
    """What both tasks have in common: the instructions that are drawn of each picture, the same for both."""

    def __init__(self, tokenizer: Tokenizer, settings: InstructionSettings, context_length: int, seed: int):
        self.tokenizer, self.settings, self.seed = tokenizer, settings, seed
        self.context_length = context_length

    def _meanings(self, batch: Any) -> list[tuple[int, list[Instruction]]]:
        """(row, phrasings of one meaning), up to `per_picture` meanings of every good row."""
        drawn = []
        for row in batch.valid.nonzero().flatten().tolist():
            meanings = draw(batch.records[row], self.seed, int(batch.positions[row]), self.settings.per_picture)
            drawn += [(row, phrasings) for phrasings in meanings]
        return drawn

    def _prompt(self, instruction: Instruction) -> list[int]:
        return encode_prompt(self.tokenizer, self.settings.prompt, instruction.question, self.context_length)


class ResponseTask(_Drawn):
    """L_prompt: cross entropy of the response's tokens, summed."""

    name, weight = "prompt", 1.0

    def prepare(self, batch: Any) -> dict[str, Tensor]:
        """Texts [texts, length] with their rows in the batch; `predicts` [texts, length - 1] where a response is next."""
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
        input_ids, lengths = pad_tokens(texts, self.tokenizer.pad_id, self.context_length)
        target = torch.arange(1, input_ids.shape[1])
        predicts = (target >= torch.tensor(starts)[:, None]) & (target < lengths[:, None])
        return {
            "rows": torch.tensor(rows),
            "input_ids": input_ids,
            "lengths": lengths,
            "predicts": predicts,
            "count": predicts.sum(),
        }

    def loss_sum(self, model: MMScaleModel, shared: Any, inputs: dict[str, Tensor]) -> Tensor:
        input_ids, predicts = inputs["input_ids"], inputs["predicts"]
        length = input_ids.shape[1] - 1  # the last token predicts nothing
        real = torch.arange(length, device=input_ids.device) < inputs["lengths"][:, None] - 1
        packing = Packing.of(real)
        _, text_tokens = model.text(input_ids[:, :length], packing=packing)
        hidden = model.decoder(text_tokens, shared.image_tokens[inputs["rows"]], packing=packing)
        wanted = predicts.flatten()[packing.index].nonzero().squeeze(1)
        return model.decoder.head(hidden[wanted], input_ids[:, 1:][predicts])


class AlignmentTask(_Drawn):
    """L_align: squared distances between the embeddings of the two phrasings of each meaning, summed."""

    name = "align"

    @property
    def weight(self) -> float:
        return self.settings.align

    def prepare(self, batch: Any) -> dict[str, Tensor]:
        """Prompts [2 * pairs, length], a pair's side by side; `real` [pairs] is False for a pair that fills up."""
        pairs = [phrasings[:2] for _, phrasings in self._meanings(batch) if len(phrasings) > 1]
        texts = [[*self._prompt(one), self.tokenizer.end_id] for pair in pairs for one in pair]
        real = torch.ones(max(len(pairs), 1), dtype=torch.bool)
        if not pairs:
            texts, real[0] = [[self.tokenizer.start_id, self.tokenizer.end_id]] * 2, False
        input_ids, lengths = pad_tokens(texts, self.tokenizer.pad_id, self.context_length)
        return {"input_ids": input_ids, "lengths": lengths, "real": real, "count": real.sum()}

    def loss_sum(self, model: MMScaleModel, shared: Any, inputs: dict[str, Tensor]) -> Tensor:
        embeds, _ = model.text(inputs["input_ids"], inputs["lengths"])
        one, other = F.normalize(embeds, dim=-1).unflatten(0, (-1, 2)).unbind(1)
        return ((one - other).square().sum(1) * inputs["real"]).sum()


def draw(record: dict, seed: int, position: int, number: int) -> list[list[Instruction]]:
    """Up to so many meanings of a sample, each with its phrasings in an order of chance; a function of the position."""
    meanings: dict[str, list[Instruction]] = {}
    for index, instruction in enumerate(read_instructions(record)):
        if not instruction.held_out:
            meanings.setdefault(instruction.meaning or f"entry {index}", []).append(instruction)
    rng = random.Random(f"{seed}/{position}")
    chosen = rng.sample(list(meanings.values()), min(number, len(meanings)))
    return [rng.sample(phrasings, len(phrasings)) for phrasings in chosen]
