"""Captions: written by the model, compared with what people wrote."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.config import EvalConfig
from mmscale.data.loader import EvalBatch
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.ranks import gather_lists, rank_and_world_size
from mmscale.model.modeling_mmscale import MMScaleModel


@dataclass
class Caption:
    """One picture's generated caption beside those that people wrote."""

    position: int
    key: str
    generated: str
    references: list[str]

    @property
    def matches(self) -> bool:
        return exact_match(self.generated, self.references)


class Captioning:
    """The task in an evaluation: writes a caption for every picture and compares it with the references.

    After `finish`, `captions` holds every picture's, in the order of the split.
    """

    def __init__(self, model: MMScaleModel, tokenizer: Tokenizer, config: EvalConfig):
        if not model.config.decoder_config.layers:
            raise UserError("this model has no decoder, so it cannot write captions: leave the task `caption` out")
        self.model, self.tokenizer = model, tokenizer
        self.captions: list[Caption] = []

    def add(self, batch: EvalBatch, pixel_values: Tensor, image_embeds: Tensor) -> None:
        """Captions one batch; `pixel_values` is `[batch, 3, height, width]` on the model's device."""
        generated = generate_captions(self.model, self.tokenizer, pixel_values)
        for row in batch.valid.nonzero().flatten().tolist():
            position, key = int(batch.positions[row]), batch.keys[row]
            self.captions.append(Caption(position, key, generated[row], batch.captions[row]))

    def finish(self) -> dict[str, float]:
        """The scores over all ranks. Collective."""
        self.captions = sorted(gather_lists(self.captions), key=lambda caption: caption.position)
        if not self.captions:
            return {}
        return {"caption_exact_match": sum(caption.matches for caption in self.captions) / len(self.captions)}


@torch.no_grad()
def generate_captions(
    model: MMScaleModel, tokenizer: Tokenizer, pixel_values: Tensor, max_length: int | None = None, **options
) -> list[str]:
    """One caption for each picture; greedy unless `options` say otherwise.

    Collective under a process group: all ranks call it equally often and leave it together.

    Args:
        pixel_values: `[batch, 3, height, width]`, uint8 or normalised floats, on the model's device.
        max_length: longest caption in tokens, marks included; the model's context length unless given.
        options: of `GenerationMixin.generate`, such as `num_beams=4` or `do_sample=True, top_p=0.9`.
    """
    context_length = model.config.text_config.context_length
    token_ids = model.generate(
        pixel_values=pixel_values,
        max_length=min(max_length or context_length, context_length),
        synced_gpus=rank_and_world_size()[1] > 1,
        **{"do_sample": False, "num_beams": 1, **options},
    )
    return [tokenizer.decode(_until_end(ids, tokenizer)) for ids in token_ids.tolist()]


def exact_match(caption: str, references: Sequence[str]) -> bool:
    """Whether a caption is word for word one of the references; only spacing is forgiven."""
    return " ".join(caption.split()) in {" ".join(reference.split()) for reference in references}


def _until_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids[: ids.index(tokenizer.end_id)] if tokenizer.end_id in ids else ids
