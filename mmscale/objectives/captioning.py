"""The captioning loss: every real token is predicted from the picture and the tokens before it."""

import torch
from torch import Tensor

from mmscale.model.head import VocabularyHead
from mmscale.model.layers import Packing


def predicted_tokens(lengths: Tensor, valid: Tensor, length: int) -> Tensor:
    """bool [batch, length - 1]: True at t where token t + 1 is real and its sample valid.

    Which tokens count follows from the lengths alone: no token id doubles as "ignore".
    """
    position = torch.arange(1, length, device=lengths.device)
    return (position < lengths[:, None]) & valid[:, None]


def count_predicted(lengths: Tensor, valid: Tensor) -> Tensor:
    """How many tokens a batch's captions ask to predict: all real ones but the start mark."""
    return ((lengths - 1).clamp(min=0) * valid).sum()


def caption_loss(
    head: VocabularyHead,
    hidden: Tensor,
    input_ids: Tensor,
    predicted: Packing | None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross entropy of the next token, *summed* over this rank's predicted tokens; divide by the global count.

    Args:
        hidden: the decoder's states, [tokens, width] for the places in `predicted`, else [batch, length - 1, width].
        input_ids: [batch, length].
        predicted: of `predicted_tokens`; None when that is True everywhere.
    """
    labels = input_ids[:, 1:].flatten()
    if predicted is None:
        return head(hidden.flatten(0, 1), labels, label_smoothing, z_loss)
    return head(hidden, labels[predicted.index], label_smoothing, z_loss)
