"""The pretraining objective: contrastive plus captioning, the same gradient for any number of ranks and micro-batches.

A rank's loss is

    world size * (contrastive_weight * local sum / global pairs + caption_weight * local sum / global tokens)

so that gradients *averaged* over ranks, and *summed* over micro-batches, are those of one process that sees the whole
global batch, also where samples are masked or captions differ in length.

With several micro-batches the contrastive loss still spans the global batch: a first pass without gradients embeds
everything, the loss and its gradient with respect to the embeddings are computed once, and a second pass carries that
gradient into the parameters, one micro-batch at a time (https://arxiv.org/abs/2101.06983).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.config import ObjectiveConfig
from mmscale.errors import UserError
from mmscale.model.layers import Packing
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.objectives.captioning import caption_loss, count_predicted, predicted_tokens
from mmscale.objectives.collectives import begin_sum_over_ranks, sum_over_ranks, world_size
from mmscale.objectives.contrastive import contrastive_loss

if TYPE_CHECKING:
    from mmscale.data.loader import Batch


class PretrainingObjective(nn.Module):
    """The model with its losses; every parameter is read inside this module's forward.

    A loss of weight 0 is not computed, and what only serves it is frozen: without the captioning loss the decoder;
    without the contrastive loss both projections, the text tower's CLS token and last norm, and the logit scale.

    Args:
        seed: keys patch dropout, together with a sample's position in the stream.

    Raises:
        UserError: both weights are 0, the model lacks a part, or the sigmoid loss its bias.
    """

    def __init__(self, model: MMScaleModel, objective: ObjectiveConfig, seed: int = 0):
        super().__init__()
        self.model, self.objective, self.seed = model, objective, seed
        self.contrastive = objective.contrastive_weight > 0
        self.caption = objective.caption_weight > 0
        if not (self.contrastive or self.caption):
            raise UserError("objective: contrastive_weight and caption_weight are both 0: there is nothing to train")
        if self.caption and model.decoder is None:
            raise UserError("objective.caption_weight: a model with decoder.layers 0 writes no captions; set it to 0")
        if self.contrastive and (objective.contrastive == "siglip") != (model.logit_scale.bias is not None):
            raise UserError(
                f"objective.contrastive: `{objective.contrastive}` needs a model "
                f"{'with' if objective.contrastive == 'siglip' else 'without'} a logit bias, which this one is not"
            )
        if not self.caption and model.decoder is not None:
            model.decoder.requires_grad_(False)
        if not self.contrastive:
            for part in (model.vision.projection, model.text.norm_final, model.text.projection, model.logit_scale):
                part.requires_grad_(False)
            model.text.cls_token.requires_grad_(False)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        lengths: Tensor,
        valid: Tensor,
        positions: Tensor,
        encoded: Packing | None = None,
        predicted: Packing | None = None,
        num_valid: Tensor | None = None,
        num_tokens: Tensor | None = None,
        embedding_gradients: tuple[Tensor, Tensor, Tensor] | None = None,
        embed_only: bool = False,
    ) -> tuple[Tensor, ...]:
        """One micro-batch.

        Args:
            pixel_values, input_ids, lengths, valid, positions: the fields of a `Batch`, on the model's device.
            encoded, predicted: the tokens that the text tower and the decoder have to compute; None for all of them.
                `packings` makes them.
            num_valid, num_tokens: valid pairs and predicted tokens of the global batch, at least 1.
            embedding_gradients: of the summed contrastive loss, with respect to this micro-batch's picture and text
                embeddings [batch, embed_dim] and its part of that of the logit scale and bias [2]. They stand in for
                the loss, which is then a number without that meaning.
            embed_only: return the embeddings and [scale, bias], and nothing of the losses.

        Returns:
            The loss to differentiate; and detached: this rank's sums of the contrastive and of the captioning loss, and
            the logit scale.
        """
        model = self.model
        keep = model.kept_patches(positions, self.seed)
        image_embeds, image_tokens = model.vision(
            pixel_values, keep, embed=self.contrastive, tokens=self.caption and not embed_only
        )
        if self.contrastive:
            text_embeds, text_tokens = model.text(input_ids, lengths, packing=encoded)
            image_embeds, text_embeds = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)
            scale_bias = model.logit_scale()
        else:
            _, text_tokens = model.text(input_ids[:, :-1], packing=encoded)
        if embed_only:
            return image_embeds, text_embeds, scale_bias

        zero = torch.zeros((), device=pixel_values.device)
        contrastive_sum = caption_sum = loss = zero
        if self.contrastive:
            if embedding_gradients is None:
                contrastive_sum = contrastive_loss(
                    self.objective.contrastive, image_embeds, text_embeds, scale_bias, valid
                )
            else:
                tensors = (image_embeds, text_embeds, scale_bias)
                contrastive_sum = sum(
                    (tensor.float() * gradient).sum()
                    for tensor, gradient in zip(tensors, embedding_gradients, strict=True)
                )
            loss = loss + self.objective.contrastive_weight * contrastive_sum / num_valid
        if self.caption:
            length = input_ids.shape[1] - 1  # the last token predicts nothing
            hidden = model.decoder(text_tokens[:, :length], image_tokens, packing=predicted)
            caption_sum = caption_loss(
                model.decoder.head,
                hidden,
                input_ids,
                predicted,
                self.objective.label_smoothing,
                self.objective.z_loss,
            )
            loss = loss + self.objective.caption_weight * caption_sum / num_tokens
        scale = scale_bias[0].detach() if self.contrastive else zero
        return loss * world_size(), contrastive_sum.detach(), caption_sum.detach(), scale

    def packings(self, batch: "Batch") -> dict[str, Packing | None]:
        """`encoded` and `predicted` of `forward`. On the host they are made without waiting for the device."""
        length = batch.input_ids.shape[1]
        predicted = predicted_tokens(batch.lengths, batch.valid, length)
        encoded = predicted
        if self.contrastive:  # all tokens, and CLS after the last
            encoded = torch.arange(length + 1, device=batch.lengths.device) <= batch.lengths[:, None]
        if self.contrastive and self.model.config.legacy_cls_mask:
            encoded = torch.ones_like(encoded)
        return {
            name: None if bool(real.all()) else Packing.of(real)
            for name, real in (("encoded", encoded), ("predicted", predicted))
        }


def forward_backward(
    module: nn.Module, micro_batches: "list[Batch]", backward: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    """Gradients of the loss of one global batch: one `backward` for each of this rank's micro-batches.

    Args:
        module: a `PretrainingObjective`, or a DeepSpeed engine around one.
        micro_batches: this rank's share of the global batch, as many micro-batches of the same size on every rank. They
            may be on the host: each is moved to the device when its turn comes.
        backward: differentiates a loss. Gradients are expected to be averaged over ranks and summed over calls.

    Returns:
        Detached tensors, equal on every rank: loss, loss_contrastive, loss_caption (means over the global batch),
        logit_scale, num_valid, num_tokens.
    """
    objective = getattr(module, "module", module)
    assert isinstance(objective, PretrainingObjective)
    device = next(module.parameters()).device
    counts = sum_over_ranks(
        torch.stack(
            [
                sum(batch.valid.sum() for batch in micro_batches),
                sum(count_predicted(batch.lengths, batch.valid) for batch in micro_batches),
            ]
        ).to(device)
    )
    num_valid, num_tokens = counts.clamp(min=1).unbind()
    cached = objective.contrastive and objective.objective.negatives == "global" and len(micro_batches) > 1
    if cached:
        contrastive_sum, gradients = _embedding_gradients(module, objective, micro_batches, device)
    sums = torch.zeros(2, device=device)
    scale = None
    for index, batch in enumerate(micro_batches):
        loss, contrastive_part, caption_part, scale = module(
            **_inputs(objective, batch, device),
            num_valid=num_valid,
            num_tokens=num_tokens,
            embedding_gradients=gradients[index] if cached else None,
        )
        sums += torch.stack([contrastive_part, caption_part])
        if index == len(micro_batches) - 1:
            if cached:
                sums[0] = contrastive_sum
            finish_sums = begin_sum_over_ranks(sums)  # while the backward pass runs
        backward(loss)
    contrastive, caption = (finish_sums() / torch.stack([num_valid, num_tokens])).unbind()
    weights = objective.objective
    return {
        "loss": weights.contrastive_weight * contrastive + weights.caption_weight * caption,
        "loss_contrastive": contrastive,
        "loss_caption": caption,
        "logit_scale": scale,
        "num_valid": counts[0],
        "num_tokens": counts[1],
    }


def _embedding_gradients(
    module: nn.Module, objective: PretrainingObjective, micro_batches: "list[Batch]", device: torch.device
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """The summed contrastive loss of this rank, and its gradients for each micro-batch (see `forward`)."""
    with torch.no_grad():
        embedded = [module(**_inputs(objective, batch, device), embed_only=True) for batch in micro_batches]
    image, text = (torch.cat([item[i].float() for item in embedded]).requires_grad_() for i in (0, 1))
    scale_bias = embedded[0][2].detach().requires_grad_()
    valid = torch.cat([batch.valid for batch in micro_batches]).to(device)
    loss = contrastive_loss(objective.objective.contrastive, image, text, scale_bias, valid)
    d_image, d_text, d_scale_bias = torch.autograd.grad(loss, (image, text, scale_bias))
    sizes = [len(batch.valid) for batch in micro_batches]
    d_scale_bias /= len(micro_batches)  # each backward carries its part
    return loss.detach(), [
        (for_image, for_text, d_scale_bias)
        for for_image, for_text in zip(d_image.split(sizes), d_text.split(sizes), strict=True)
    ]


def _inputs(objective: PretrainingObjective, batch: "Batch", device: torch.device) -> dict[str, Any]:
    names = ("pixel_values", "input_ids", "lengths", "valid", "positions")
    tensors = {name: getattr(batch, name).to(device, non_blocking=True) for name in names}
    packings = {
        name: packing.to(device) if packing is not None else None for name, packing in objective.packings(batch).items()
    }
    return tensors | packings
