"""The objective of an adaptation: a weighted sum of tasks, the same gradient for any number of ranks and micro-batches.

Each task gives a *summed* loss over its terms. A rank's loss is

    world size * sum over tasks of weight * local sum / global count

so that gradients averaged over ranks and summed over micro-batches are those of one process on the whole global batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmscale.data.batches import Batch, LabelledBatch
from mmscale.data.loader import EvalSet
from mmscale.evaluate.encoding import model_device
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.objectives.collectives import sum_over_ranks, world_size


class Encoded:
    """One micro-batch through the towers; each part is computed when it is first asked for.

    Args:
        pixel_values, input_ids, lengths: the fields of a `Batch`. A masked slot's length is taken for 1, so that it has
            a last token.
        image, text: the parts themselves, where they are known already, in place of these.

    Attributes:
        image_embeds, text_embeds: [batch, embed_dim], of unit length.
        image_tokens: [batch, picture tokens, embed_dim]. text_tokens: [batch, length, width].
        lengths: [batch], at least 1.
    """

    def __init__(
        self,
        model: MMScaleModel,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        image: tuple[Tensor, Tensor] | None = None,
        text: tuple[Tensor, Tensor] | None = None,
    ):
        self.model, self.pixel_values, self.input_ids = model, pixel_values, input_ids
        self.lengths = lengths.clamp(min=1) if lengths is not None else None
        self._image, self._text = image, text

    @classmethod
    def of(cls, model: MMScaleModel, batch: Batch) -> "Encoded":
        """A batch that is still on the host."""
        device = model_device(model)
        return cls(model, *(getattr(batch, name).to(device) for name in ("pixel_values", "input_ids", "lengths")))

    @property
    def image(self) -> tuple[Tensor, Tensor]:
        if self._image is None:
            self._image = self.model.encode_image(self.pixel_values)
        return self._image

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        if self._text is None:
            self._text = self.model.encode_text(self.input_ids, lengths=self.lengths)
        return self._text

    image_embeds = property(lambda self: self.image[0])
    image_tokens = property(lambda self: self.image[1])
    text_embeds = property(lambda self: self.text[0])
    text_tokens = property(lambda self: self.text[1])

    def paired(self, images: Tensor | None = None, texts: Tensor | None = None) -> "Encoded":
        """Rows of the pictures beside rows of the texts; all in their order where None."""
        image = self.image if images is None else tuple(part[images] for part in self.image)
        text = self.text if texts is None else tuple(part[texts] for part in self.text)
        ids, lengths = (part if texts is None else part[texts] for part in (self.input_ids, self.lengths))
        return Encoded(self.model, input_ids=ids, lengths=lengths, image=image, text=text)

    def with_text(self, input_ids: Tensor, lengths: Tensor) -> "Encoded":
        """The same pictures with other texts."""
        return Encoded(self.model, input_ids=input_ids, lengths=lengths, image=self.image)


class AdaptationTask(Protocol):
    """What is trained and scored. `weight` is its share of the loss; `name` opens the names of its scores."""

    name: str
    weight: float

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """What the loss needs beside the batch, on the host; `count` [] is the number of its terms."""

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        """The loss summed over this micro-batch's terms. All rows are computed and the others masked, so that every
        parameter is used on every rank."""

    def evaluate(self, model: MMScaleModel, split: EvalSet) -> dict[str, float]:
        """Scores on a split, equal on every rank. Collective."""


class AdaptationObjective(nn.Module):
    """The model with its tasks; every parameter is read inside this module's forward."""

    def __init__(self, model: MMScaleModel, tasks: Sequence[AdaptationTask]):
        super().__init__()
        self.model, self.tasks = model, list(tasks)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        lengths: Tensor,
        inputs: list[dict[str, Tensor]],
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One micro-batch: the loss to differentiate, and each task's own sum, detached [tasks].

        Args:
            inputs: of every task's `prepare`. counts: [tasks], terms of the global batch, at least 1 each.
        """
        encoded = Encoded(self.model, pixel_values, input_ids, lengths)
        sums = torch.stack(
            [task.loss_sum(self.model, encoded, given).float() for task, given in zip(self.tasks, inputs, strict=True)]
        )
        weights = torch.tensor([task.weight for task in self.tasks], device=sums.device)
        return (weights * sums / counts).sum() * world_size(), sums.detach()


def forward_backward(
    module: nn.Module, micro_batches: list[LabelledBatch], backward: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    """Gradients of the loss of one global batch; as the function of this name in `mmscale.objectives.pretraining`.

    Returns:
        Detached tensors, equal on every rank: `loss`, and for every task `loss_NAME`, the mean over its terms.
    """
    objective = getattr(module, "module", module)
    assert isinstance(objective, AdaptationObjective)
    device = next(module.parameters()).device
    prepared = [[task.prepare(batch) for task in objective.tasks] for batch in micro_batches]
    counts = torch.tensor([[float(inputs["count"]) for inputs in of_batch] for of_batch in prepared]).sum(0)
    counts = sum_over_ranks(counts.to(device))
    divisors = torch.where(counts > 0, counts, torch.ones_like(counts))
    total = torch.zeros(len(objective.tasks), device=device)
    for batch, inputs in zip(micro_batches, prepared, strict=True):
        loss, sums = module(
            **{name: getattr(batch, name).to(device) for name in ("pixel_values", "input_ids", "lengths")},
            inputs=[_to(given, device) for given in inputs],
            counts=divisors,
        )
        backward(loss)
        total += sums
    means = sum_over_ranks(total) / divisors
    weights = torch.tensor([task.weight for task in objective.tasks], device=device)
    return {
        "loss": (weights * means).sum(),
        **{f"loss_{task.name}": mean for task, mean in zip(objective.tasks, means, strict=True)},
    }


def masked_sum(terms: Tensor, mask: Tensor) -> Tensor:
    """The sum of `terms` where `mask` is True; what is masked may even be no number."""
    return torch.where(mask, terms, torch.zeros_like(terms)).sum()


def pad_ids(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token lists, right-padded [rows, longest], and their lengths [rows]."""
    lengths = torch.tensor([len(ids) for ids in rows])
    return nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], True, pad_id), lengths


def _to(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device, non_blocking=True) for name, value in given.items() if name != "count"}
