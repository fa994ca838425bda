"""Captions: written by the model, compared with what people wrote."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.config import EvalConfig
from mmscale.data.loader import EvalBatch
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.caption_metrics import caption_scores
from mmscale.evaluate.ranks import gather_lists, rank_and_world_size
from mmscale.model.modeling_mmscale import MMScaleModel

ANSWER_ROOM = 16  # tokens that a prompt leaves to what goes on from it


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

    def add(self, batch: EvalBatch, pixel_values: Tensor, image_embeds: Tensor, image_tokens: Tensor) -> None:
        """Captions one batch; `pixel_values` is `[batch, 3, height, width]` on the model's device."""
        generated = generate_captions(self.model, self.tokenizer, pixel_values, image_tokens=image_tokens)
        for row in batch.valid.nonzero().flatten().tolist():
            position, key = int(batch.positions[row]), batch.keys[row]
            self.captions.append(Caption(position, key, generated[row], batch.captions[row]))

    def finish(self) -> dict[str, float]:
        """The scores over all ranks. Collective."""
        self.captions = sorted(gather_lists(self.captions), key=lambda caption: caption.position)
        if not self.captions:
            return {}
        scores = caption_scores([c.generated for c in self.captions], [c.references for c in self.captions])
        return {"caption_exact_match": sum(caption.matches for caption in self.captions) / len(self.captions)} | {
            f"caption_{name}": value for name, value in scores.items()
        }


@torch.no_grad()
def generate_captions(
    model: MMScaleModel,
    tokenizer: Tokenizer,
    pixel_values: Tensor,
    max_length: int | None = None,
    prompts: Sequence[str] | None = None,
    **options,
) -> list[str]:
    """One caption for each picture, or what goes on from its prompt; greedy unless `options` say otherwise.

    Collective under a process group: all ranks call it equally often and leave it together.

    Args:
        pixel_values: `[batch, 3, height, width]`, uint8 or normalised floats, on the model's device.
        max_length: longest caption in tokens, marks included; the model's context length unless given.
        prompts: a text for each picture to go on from; it is not part of what is returned.
        options: of `MMScaleModel.generate`, such as `num_beams=4`, `do_sample=True, top_p=0.9`, or `image_tokens`.
    """
    context_length = model.config.text_config.context_length
    prompt = _left_padded(prompts, tokenizer, context_length, pixel_values.device) if prompts is not None else {}
    token_ids = model.generate(
        pixel_values=pixel_values,
        **prompt,
        max_length=min(max_length or context_length, context_length),
        synced_gpus=rank_and_world_size()[1] > 1,
        **{"do_sample": False, "num_beams": 1, **options},
    )
    start = prompt["input_ids"].shape[1] if prompt else 0
    return [tokenizer.decode(_until_end(ids, tokenizer)) for ids in token_ids[:, start:].tolist()]


def exact_match(caption: str, references: Sequence[str]) -> bool:
    """Whether a caption is word for word one of the references; only spacing is forgiven."""
    return " ".join(caption.split()) in {" ".join(reference.split()) for reference in references}


def _left_padded(prompts: Sequence[str], tokenizer: Tokenizer, context_length: int, device: torch.device) -> dict:
    """Prompts without their end mark as `generate` takes them; one that leaves no room for an answer is cut."""
    longest = context_length - min(ANSWER_ROOM, context_length // 2)
    ids = [tokenizer.encode(prompt, longest + 1)[:-1] for prompt in prompts]
    width = max(map(len, ids))
    pads = [width - len(own) for own in ids]
    input_ids = torch.tensor([[tokenizer.pad_id] * pad + own for pad, own in zip(pads, ids, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def _until_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids[: ids.index(tokenizer.end_id)] if tokenizer.end_id in ids else ids
