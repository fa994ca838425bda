"""The two stacks that texts run through: the text tower, and the multimodal decoder on top of it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from .configuration_mmscale import MMScaleConfig
from .head import VocabularyHead
from .layers import Block, CrossBlock, Packing, lower_right_causal_mask
from .linear import Linear


class TextTower(nn.Module):
    """Causal text encoder whose CLS token gives the text embedding."""

    def __init__(self, config: MMScaleConfig):
        super().__init__()
        text = config.text_config
        self.config, self.pad_id, self.legacy_cls_mask = text, config.pad_token_id, config.legacy_cls_mask
        self.tokens = nn.Embedding(config.vocab_size, text.width)
        self.cls_token = nn.Parameter(torch.empty(text.width))
        self.positions = nn.Parameter(torch.empty(text.context_length + 1, text.width))
        self.blocks = nn.ModuleList(
            Block(text, text.width, text.heads, text.mlp_ratio, text.layers, layer_idx)
            for layer_idx in range(text.layers)
        )
        self.norm_final = nn.LayerNorm(text.width, eps=text.layer_norm_eps)
        self.projection = Linear(text.width, config.embed_dim, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Embedding [batch, embed_dim], not normalised, and token states [batch, length, width].

        Args:
            input_ids: [batch, length], right-padded when `lengths` are given.
            lengths: [batch], real tokens. Without them there is no CLS token, and the embedding is None.
            positions: rows of the position table, [length] or [batch, length]; from 0 on when None.
            mask: as in `attend`, instead of plain causal attention; without `lengths` only.
            past_key_values: the cache; without `lengths` only.
            packing: where tokens, and CLS if there are `lengths`, are in [batch, length (+ 1)]; nothing is computed for
                other places, and their states are 0.
            context: [batch, vectors, width], learned vectors in place of the tokens that follow the first.
        """
        length = input_ids.shape[1]
        if positions is None:
            if length > self.config.context_length:
                raise ValueError(
                    f"a text of {length} tokens is longer than context_length {self.config.context_length}"
                )
            positions = torch.arange(length, device=input_ids.device)
        if lengths is not None and self.legacy_cls_mask:
            return self._forward_legacy(input_ids, lengths, context)
        table = self.positions
        x = self._embed(input_ids, context) + table[positions]
        if lengths is not None:
            cls_row = (self.cls_token + table[-1]).to(x.dtype)
            after_last = torch.arange(length + 1, device=x.device) == lengths[:, None]
            x = torch.where(after_last[..., None], cls_row, F.pad(x, (0, 0, 0, 1)))
        if packing is not None:
            x = packing.pack(x)
        for block in self.blocks:
            x = block(x, mask, mask is None, past_key_values, packing)
        if packing is not None:
            x = packing.pad(x)
        if lengths is None:
            return None, x
        return self._embedding(x[torch.arange(x.shape[0], device=x.device), lengths]), x[:, :length]

    def _embed(self, input_ids: Tensor, context: Tensor | None) -> Tensor:
        x = self.tokens(input_ids)
        if context is None:
            return x
        return torch.cat([x[:, :1], context.to(x.dtype), x[:, 1 + context.shape[1] :]], dim=1)

    def _forward_legacy(self, input_ids: Tensor, lengths: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """CLS at the very end, behind a mask that is shifted by one: it sees the first pad, and not itself."""
        length, full = input_ids.shape[1], self.config.context_length
        # The mask's outcome depends on there being a pad column, unless the caption fills the whole context.
        pads = min(length + 1, full) - length
        input_ids = F.pad(input_ids, (0, pads), value=self.pad_id)
        table = self.positions
        x = self._embed(input_ids, context) + table[: length + pads]
        cls_row = (self.cls_token + table[-1]).to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([x, cls_row], dim=1)
        column = torch.arange(x.shape[1], device=x.device)
        visible = (column <= lengths[:, None])[:, None, None, :]
        mask = visible & lower_right_causal_mask(x.shape[1], x.shape[1], x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self._embedding(x[:, -1]), x[:, :length]

    def _embedding(self, cls_state: Tensor) -> Tensor:
        return self.projection(self.norm_final(cls_state))

    def reset_parameters(self):
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.cls_token, std=0.01)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection.weight, std=self.config.width**-0.5)


class Decoder(nn.Module):
    """Multimodal decoder: each layer is a causal block over the text and a block that attends to the picture."""

    def __init__(self, config: MMScaleConfig):
        super().__init__()
        decoder, width = config.decoder_config, config.text_config.width
        self.config = decoder
        first = config.text_config.layers  # one cache spans the text tower and this decoder
        self.blocks = nn.ModuleList(
            Block(decoder, width, decoder.heads, decoder.mlp_ratio, 2 * decoder.layers, first + layer)
            for layer in range(decoder.layers)
        )
        self.cross_blocks = nn.ModuleList(
            CrossBlock(decoder, width, config.embed_dim, decoder.heads, decoder.mlp_ratio, 2 * decoder.layers)
            for _ in range(decoder.layers)
        )
        self.norm_final = nn.LayerNorm(width, eps=decoder.layer_norm_eps)
        self.head = VocabularyHead(width, config.vocab_size)

    def keys_values(self, image_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values of a picture, for decoding many steps."""
        context = self.standardise(image_tokens)
        return [block.attention.key_value(context) for block in self.cross_blocks]

    def standardise(self, image_tokens: Tensor) -> Tensor:
        """What all layers' norms of the picture tokens have in common."""
        return F.layer_norm(image_tokens, image_tokens.shape[-1:], eps=self.config.layer_norm_eps)

    def forward(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor | None,
        keys_values: list[tuple[Tensor, Tensor]] | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """[batch, length, width] to the same; `decoder.head` makes logits of it.

        Args:
            image_tokens: [pictures, picture tokens, embed_dim]; or None, and of them made before:
            keys_values: by the method of that name; or
            context: by `standardise`.
            packing: the tokens that are wanted; the result is then packed, [tokens, width].
        """
        x = text_tokens if packing is None else packing.pack(text_tokens)
        if keys_values is None and context is None:
            context = self.standardise(image_tokens)
        for layer, (block, cross_block) in enumerate(zip(self.blocks, self.cross_blocks, strict=True)):
            x = block(x, mask, mask is None, past_key_values, packing)
            x = cross_block(x, context, keys_values[layer] if keys_values is not None else None, packing)
        return self.norm_final(x)

    def reset_parameters(self):
        nn.init.normal_(self.head.weight, std=self.head.in_features**-0.5)
