"""Instruction embeddings, how alike instructions are, and their clusters."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.encoding import encode_shared_texts
from mmscale.model.modeling_mmscale import MMScaleModel


@torch.no_grad()
def embed_texts(model: MMScaleModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """The text tower's embeddings, [texts, embed_dim], of unit length: their products are cosine similarities."""
    return encode_shared_texts(model, tokenizer, texts, batch_size).cpu()


def cluster_texts(embeds: Tensor, number: int, seed: int) -> np.ndarray:
    """k-means clusters [texts], numbered from the largest to the smallest. Raises UserError."""
    from sklearn.cluster import KMeans

    if len(embeds) < number:
        raise UserError(f"adapt.build_instructions.clusters: {number} clusters of {len(embeds)} different instructions")
    labels = KMeans(number, n_init=4, random_state=seed).fit_predict(embeds.numpy())
    order = np.argsort(-np.bincount(labels, minlength=number), kind="stable")
    return np.argsort(order)[labels]


def meaning_distances(embeds: Tensor, meanings: Sequence[str]) -> dict[str, float]:
    """Mean squared distances between different texts: of the same meaning, of different ones, and their quotient.

    The alignment loss makes the first small. It is worth something only where the second stays: all texts in one place
    have the same meaning, too.
    """
    _, group = np.unique(np.asarray(meanings), return_inverse=True)
    group = torch.from_numpy(group)
    distances = (2 - 2 * embeds @ embeds.T).clamp(min=0)
    others = ~torch.eye(len(embeds), dtype=torch.bool)
    same = (group[:, None] == group) & others
    if not same.any() or not (~same & others).any():
        return {}
    within, between = distances[same].mean().item(), distances[~same & others].mean().item()
    return {"same_meaning": within, "other_meaning": between, "same_to_other": within / between if between else 1.0}
