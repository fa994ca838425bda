"""Texts to embeddings, over any number of ranks, with the same number of forwards on each (ZeRO-3 needs that)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmscale.data.tokenizer import Tokenizer
from mmscale.evaluate.ranks import gather_rows, max_over_ranks, rank_and_world_size
from mmscale.model.modeling_mmscale import MMScaleModel


def pad_tokens(token_ids: Sequence[Sequence[int]], pad_id: int, context_length: int) -> tuple[Tensor, Tensor]:
    """Token lists as one right-padded tensor, as wide as the loader makes it: the width + 1 (CLS) is a multiple of 8.

    Returns:
        `input_ids` `[texts, width]` and `lengths` `[texts]`, int64.
    """
    lengths = torch.tensor([len(ids) for ids in token_ids])
    width = min(-(-(int(lengths.max()) + 1) // 8) * 8 - 1, context_length)
    input_ids = torch.full((len(token_ids), width), pad_id)
    for row, ids in enumerate(token_ids):
        input_ids[row, : len(ids)] = torch.tensor(ids)
    return input_ids, lengths


@torch.no_grad()
def encode_own_texts(model: MMScaleModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> Tensor:
    """Embeddings of this rank's own texts. Collective: a rank with fewer texts joins in with dummy batches.

    Returns:
        `[texts, dim]` float32, L2-normalised, on the model's device.
    """
    device = model_device(model)
    context_length = model.config.text_config.context_length
    embeds = [torch.zeros(0, model.config.embed_dim, device=device)]
    for batch in range(max_over_ranks(-(-len(texts) // batch_size), device)):
        own = texts[batch * batch_size : (batch + 1) * batch_size]
        input_ids, lengths = pad_tokens(
            [tokenizer.encode(text, context_length) for text in own or [""]], tokenizer.pad_id, context_length
        )
        text_embeds, _ = model.encode_text(input_ids.to(device), lengths=lengths.to(device))
        embeds.append(text_embeds[: len(own)].float())
    return torch.cat(embeds)


def encode_shared_texts(model: MMScaleModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> Tensor:
    """Embeddings `[texts, dim]` of texts that every rank holds: each encodes its share, all get the whole."""
    rank, world_size = rank_and_world_size()
    own = encode_own_texts(model, tokenizer, texts[rank::world_size], batch_size)
    gathered = gather_rows(own)
    row_of_text = [index for start in range(world_size) for index in range(start, len(texts), world_size)]
    embeds = torch.empty_like(gathered)
    embeds[torch.tensor(row_of_text, device=embeds.device)] = gathered
    return embeds


def model_device(model: torch.nn.Module) -> torch.device:
    """Where the model computes (its first parameter's device, also while ZeRO-3 holds it in pieces)."""
    return next(model.parameters()).device
