"""Contrastive losses over the global batch, in tiles.

Both losses are sums over pairs of a picture i and a text j of a function of the logit l_ij = scale * cosine + bias:

    clip    (log sum_j exp l_ij + log sum_i exp l_ij) / 2 - l_ii     https://arxiv.org/abs/2103.00020, figure 3
    siglip  sum_j softplus(l_ij) - l_ii                              https://arxiv.org/abs/2303.15343, algorithm 1

The second is -log sigmoid(l) for the pair that belongs together and -log sigmoid(-l) for the others, since
softplus(-l) = softplus(l) - l. A rank scores its own pictures against the texts of all ranks, and owns these rows of
the logits alone: pictures are never gathered, the sums over a text's column are completed over the ranks, and the
gradient of the texts goes back to their owners. Logits exist one tile at a time, and once more in the backward pass.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.objectives.collectives import gather_rows, logsumexp_over_ranks, rank, reduce_scatter_rows

# Rows and columns of a tile: 16 MiB of fp32 logits, large enough to keep a GPU busy.
TILE = (2048, 2048)


def contrastive_loss(
    kind: str, image: Tensor, text: Tensor, scale_bias: Tensor, valid: Tensor, tile: tuple[int, int] = TILE
) -> Tensor:
    """This rank's share of the loss, *summed* over its valid pairs; divide by the global count of valid pairs.

    The gradient of a rank's embeddings is that of the sum of all ranks' shares (all of them must call backward, with
    the same upstream gradient); the gradient of `scale_bias` is this rank's part, to be summed over ranks.

    Args:
        kind: `clip` or `siglip`.
        image, text: [pairs, embed_dim] of unit length, row by row belonging together; as many on every rank.
        scale_bias: [2], the logit scale and the bias (0 for `clip`).
        valid: bool [pairs]; the others are in no row, no column and no count.
    """
    assert kind in ("clip", "siglip")
    work = torch.promote_types(image.dtype, torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        return _PairLoss.apply(kind, image.to(work), text.to(work), scale_bias.to(work), valid, tile)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind, image, text, scale_bias, valid, tile):
        texts, valid_texts = gather_rows(text, valid.to(torch.uint8))
        valid_texts = valid_texts.bool()
        total = image.new_zeros(())
        row_lse = image.new_full((image.shape[0],), -torch.inf)
        column_lse = image.new_full((texts.shape[0],), -torch.inf)
        for rows, columns, logits in _tiles(image, texts, scale_bias, valid, valid_texts, tile):
            if kind == "siglip":
                total += F.softplus(logits).sum()
            else:
                row_lse[rows] = torch.logaddexp(row_lse[rows], logits.logsumexp(1))
                column_lse[columns] = torch.logaddexp(column_lse[columns], logits.logsumexp(0))
        if kind == "clip":
            # Where nothing was valid there is nothing to normalise: 0 keeps exp(-inf - lse) at 0.
            # Embeddings of unit length have logits between -scale and scale.
            column_lse = _finite(logsumexp_over_ranks(column_lse, bound=scale_bias[0]))
            row_lse = _finite(row_lse)
            total = (row_lse + column_lse[_own_rows(text)]).sum() / 2
        matching = torch.einsum("ij,ij->i", image, text) * scale_bias[0] + scale_bias[1]
        ctx.kind, ctx.tile = kind, tile
        ctx.save_for_backward(image, text, texts, scale_bias, valid, valid_texts, row_lse, column_lse)
        return total - matching.masked_fill(~valid, 0.0).sum()

    @staticmethod
    def backward(ctx, upstream):
        image, text, texts, scale_bias, valid, valid_texts, row_lse, column_lse = ctx.saved_tensors
        # The diagonal's part first, and the factor `scale` at the end.
        matching = -valid.to(text.dtype)[:, None]
        d_image = text * matching
        d_texts = torch.zeros_like(texts)
        d_texts[_own_rows(text)].addcmul_(image, matching)
        d_bias = matching.sum()
        with torch.autocast(image.device.type, enabled=False):
            for rows, columns, logits in _tiles(image, texts, scale_bias, valid, valid_texts, ctx.tile):
                if ctx.kind == "siglip":
                    d_logits = logits.sigmoid_()
                else:
                    d_logits = (logits - row_lse[rows, None]).exp_()
                    d_logits += logits.sub_(column_lse[columns]).exp_()
                    d_logits /= 2
                d_image[rows].addmm_(d_logits, texts[columns])
                d_texts[columns].addmm_(d_logits.T, image[rows])
                d_bias += d_logits.sum()
        d_scale = torch.dot(image.flatten(), d_image.flatten())  # sum of d_logits * cosine
        d_text = reduce_scatter_rows(d_texts) if ctx.needs_input_grad[2] else None
        factor = scale_bias[0] * upstream
        return (
            None,
            d_image.mul_(factor),
            d_text.mul_(factor) if d_text is not None else None,
            torch.stack([d_scale, d_bias]) * upstream,
            None,
            None,
        )


def _tiles(
    image: Tensor, texts: Tensor, scale_bias: Tensor, valid: Tensor, valid_texts: Tensor, tile: tuple[int, int]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Row slice, column slice and logits of every tile; minus infinity where a picture or a text is not valid."""
    for top in range(0, image.shape[0], tile[0]):
        rows = slice(top, top + tile[0])
        for left in range(0, texts.shape[0], tile[1]):
            columns = slice(left, left + tile[1])
            logits = (image[rows] @ texts[columns].T).mul_(scale_bias[0]).add_(scale_bias[1])
            pairs = valid[rows, None] & valid_texts[columns]
            yield rows, columns, logits.masked_fill_(~pairs, -torch.inf)


def _own_rows(text: Tensor) -> slice:
    """Where this rank's rows are in what `gather_rows` makes of them."""
    return slice(rank() * text.shape[0], (rank() + 1) * text.shape[0])


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse.isneginf(), 0.0)
