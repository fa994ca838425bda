"""The captioning loss: every real token is predicted from the picture and the tokens before it."""

import torch
from torch import Tensor

from mmscale.model.head import VocabularyHead


def target_mask(input_ids: Tensor, lengths: Tensor, valid: Tensor) -> Tensor:
    """bool [batch, length - 1]: True at t where token t + 1 is real and its sample valid.

    Which tokens count follows from the lengths alone: no token id doubles as "ignore".
    """
    position = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    return (position < lengths[:, None]) & valid[:, None]


def count_targets(lengths: Tensor, valid: Tensor) -> Tensor:
    """How many tokens a batch's captions ask to predict: all real ones but the start mark."""
    return ((lengths - 1).clamp(min=0) * valid).sum()


def caption_loss(
    head: VocabularyHead,
    hidden: Tensor,
    input_ids: Tensor,
    lengths: Tensor,
    valid: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross entropy of the next token, *summed* over this rank's real tokens; divide by the global count.

    Args:
        hidden: [batch, length - 1, width], the decoder's states for all tokens but the last.
        input_ids: [batch, length]; lengths: [batch]; valid: bool [batch].
    """
    mask = target_mask(input_ids, lengths, valid)
    return head(hidden[mask], input_ids[:, 1:][mask], label_smoothing, z_loss)
