"""The contrastive captioner (CoCa, https://arxiv.org/abs/2205.01917) as a Transformers model.

    MMScaleModel
      vision       VisionTower: patches, ViT blocks, attentional pooler, projection of query 0
      text         TextTower: tokens and CLS, causal blocks, projection of CLS
      decoder      Decoder: causal blocks interleaved with attention to the picture, and `decoder.head` (vocabulary)
      logit_scale  LogitScale: temperature (and bias) of the contrastive loss

The CLS token stands directly after the last token of its caption and carries the last row of the position table. Under
causal attention it sees its whole caption and itself, no token sees it, and what follows (padding) is seen by nothing
that is used: no mask is needed, and the result does not depend on how far a batch is padded.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .configuration_mmscale import MMScaleConfig
from .generation import CaptionGenerationMixin, Pictures
from .head import VocabularyHead
from .layers import AttentionalPooler, Block, CrossBlock, Packing, lower_right_causal_mask
from .patch_dropout import kept_patches


@dataclass
class MMScaleOutput(ModelOutput):
    """What `MMScaleModel.forward` returns; what the inputs do not allow is None.

    Attributes:
        loss: captioning cross entropy, mean over real tokens, when `labels` are given.
        logits: [batch, length, vocabulary], row t for the token after token t.
        image_embeds, text_embeds: [batch, embed_dim], of unit length.
        logits_per_image: [pictures, texts], cosine similarities times the logit scale (plus a bias, if any).
        logits_per_text: its transpose.
        image_tokens: [batch, pooler queries - 1, embed_dim], what the decoder looks at.
        past_key_values: the cache, when one is in use.
        hidden_states: per part (`vision`, `text`, `decoder`), the input of every block and the last output.
        attentions: per part, the weights of every attention layer (`attn_implementation="eager"`).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_tokens: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: dict[str, tuple[Tensor, ...]] | None = None
    attentions: dict[str, tuple[Tensor, ...]] | None = None


class VisionTower(nn.Module):
    """ViT and attentional pooler. uint8 pictures are normalised here, on the device they are on."""

    def __init__(self, config: MMScaleConfig):
        super().__init__()
        vision = config.vision_config
        self.config = vision
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.patch_embedding = nn.Linear(3 * vision.patch_size**2, vision.width, bias=vision.patch_bias)
        self.class_token = nn.Parameter(torch.empty(vision.width)) if vision.class_token else None
        self.positions = nn.Parameter(torch.empty(vision.num_patches + int(vision.class_token), vision.width))
        self.norm_pre = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps) if vision.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(vision, vision.width, vision.heads, vision.mlp_ratio, vision.layers) for _ in range(vision.layers)
        )
        self.pooler = AttentionalPooler(vision, config.embed_dim, vision.pooler_heads, vision.pooler_queries)
        self.norm_pooled = nn.LayerNorm(config.embed_dim, eps=vision.layer_norm_eps)
        self.projection = nn.Linear(config.embed_dim, config.embed_dim, bias=False)

    def forward(
        self, pixel_values: Tensor, keep: Tensor | None = None, embed: bool = True, tokens: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """[batch, 3, height, width] to the embedding [batch, embed_dim], not normalised, and the picture tokens.

        Args:
            pixel_values: uint8, or floats that are already normalised.
            keep: int64 [batch, kept], the patches to look at; all when None.
            embed, tokens: what is wanted; the rest is None and is not computed.
        """
        x = self.trunk(pixel_values, keep)
        pooled, _ = self.pooler(x, 0 if embed else 1, None if tokens else 1)
        pooled = self.norm_pooled(pooled)
        image_embeds = self.projection(pooled[:, 0]) if embed else None
        return image_embeds, (pooled[:, int(embed) :] if tokens else None)

    def trunk(self, pixel_values: Tensor, keep: Tensor | None = None) -> Tensor:
        """The last block's output, [batch, patches (after the class token, if any), width]."""
        expected = (3, self.config.image_size, self.config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values have the shape {list(pixel_values.shape)}; expected [batch, 3, {expected[1]}, "
                f"{expected[2]}]: resize the pictures to the model's image_size"
            )
        patches = self._patches(pixel_values)
        positions = self.positions
        prefix = int(self.class_token is not None)
        grid = positions[prefix:]
        if keep is None:
            x = self.patch_embedding(patches) + grid
        else:
            x = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
            x = self.patch_embedding(x) + grid[keep]
        if self.class_token is not None:
            first = (self.class_token + positions[0]).to(x.dtype).expand(x.shape[0], 1, -1)
            x = torch.cat([first, x], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return x

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """[batch, patches, 3 * patch size squared], channels first as in a convolution's weight."""
        size = self.config.patch_size
        x = pixel_values.unfold(2, size, size).unfold(3, size, size)  # [batch, 3, rows, columns, size, size]
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(4).flatten(1, 2)  # [batch, patches, 3, size * size]
        dtype = self.patch_embedding.weight.dtype
        if not pixel_values.is_floating_point():
            mean = torch.tensor(self.image_mean, device=x.device)[:, None] * 255
            std = torch.tensor(self.image_std, device=x.device)[:, None] * 255
            x = (x - mean) / std
        return x.flatten(2).to(dtype)

    def reset_parameters(self):
        scale = self.config.width**-0.5
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=scale)
        nn.init.normal_(self.positions, std=scale)
        nn.init.normal_(self.patch_embedding.weight, std=self.patch_embedding.in_features**-0.5)
        if self.patch_embedding.bias is not None:
            nn.init.zeros_(self.patch_embedding.bias)
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)


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
        self.projection = nn.Linear(text.width, config.embed_dim, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
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
        """
        length = input_ids.shape[1]
        if positions is None:
            if length > self.config.context_length:
                raise ValueError(
                    f"a text of {length} tokens is longer than context_length {self.config.context_length}"
                )
            positions = torch.arange(length, device=input_ids.device)
        if lengths is not None and self.legacy_cls_mask:
            return self._forward_legacy(input_ids, lengths)
        table = self.positions
        x = self.tokens(input_ids) + table[positions]
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

    def _forward_legacy(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """CLS at the very end, behind a mask that is shifted by one: it sees the first pad, and not itself."""
        length, full = input_ids.shape[1], self.config.context_length
        # The mask's outcome depends on there being a pad column, unless the caption fills the whole context.
        pads = min(length + 1, full) - length
        input_ids = F.pad(input_ids, (0, pads), value=self.pad_id)
        table = self.positions
        x = self.tokens(input_ids) + table[: length + pads]
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
        context = self._standardise(image_tokens)
        return [block.attention.key_value(context) for block in self.cross_blocks]

    def _standardise(self, image_tokens: Tensor) -> Tensor:
        return F.layer_norm(image_tokens, image_tokens.shape[-1:], eps=self.config.layer_norm_eps)

    def forward(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor | None,
        keys_values: list[tuple[Tensor, Tensor]] | None = None,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """[batch, length, width] to the same; `decoder.head` makes logits of it.

        Args:
            image_tokens: [pictures, picture tokens, embed_dim]; or None and `keys_values` made of them before.
            packing: the tokens that are wanted; the result is then packed, [tokens, width].
        """
        x = text_tokens if packing is None else packing.pack(text_tokens)
        context = self._standardise(image_tokens) if keys_values is None else None
        for layer, (block, cross_block) in enumerate(zip(self.blocks, self.cross_blocks, strict=True)):
            x = block(x, mask, mask is None, past_key_values, packing)
            x = cross_block(x, context, keys_values[layer] if keys_values is not None else None, packing)
        return self.norm_final(x)

    def reset_parameters(self):
        nn.init.normal_(self.head.weight, std=self.head.in_features**-0.5)


class LogitScale(nn.Module):
    """Temperature of the contrastive loss, as a logarithm bounded from above; and the sigmoid loss's bias."""

    def __init__(self, config: MMScaleConfig):
        super().__init__()
        self.init = (config.logit_scale_init, config.logit_bias_init)
        self.limit = math.log(config.logit_scale_max)
        # One element each, not zero dimensions: sharding by DeepSpeed cannot view a 0-dim parameter as bytes.
        self.log_scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1)) if config.logit_bias_init is not None else None

    def forward(self) -> Tensor:
        """[2] in fp32: the scale, and the bias (0 where there is none)."""
        scale = _BoundedLog.apply(self.log_scale.float(), self.limit).exp()
        bias = self.bias.float() if self.bias is not None else torch.zeros_like(scale)
        return torch.cat([scale, bias])

    def reset_parameters(self):
        nn.init.constant_(self.log_scale, self.init[0])
        if self.bias is not None:
            nn.init.constant_(self.bias, self.init[1])


class _BoundedLog(torch.autograd.Function):
    """min(x, limit), with no gradient at the limit that would push x further out.

    The parameter is never written to: with sharded training a write to the module's copy misses the optimizer's.
    Whether a gradient pushes outwards is decided on the mean over all ranks, so that every rank decides the same.
    """

    @staticmethod
    def forward(ctx, x, limit):
        ctx.at_limit = x.detach() >= limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx, grad):
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            grad = grad.clone()
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        return grad.masked_fill(ctx.at_limit & (grad < 0), 0.0), None


class MMScalePreTrainedModel(PreTrainedModel):
    config_class = MMScaleConfig
    base_model_prefix = ""
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Block", "CrossBlock", "AttentionalPooler"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters") and not isinstance(module, (nn.Linear, nn.Embedding)):
            module.reset_parameters()  # our modules know the scale of the linear layers they own


class MMScaleModel(CaptionGenerationMixin, MMScalePreTrainedModel, GenerationMixin):
    """Image tower, text tower, multimodal decoder and logit scale; the parts are described at the top of this file."""

    def __init__(self, config: MMScaleConfig):
        super().__init__(config)
        self.vision = VisionTower(config)
        self.text = TextTower(config)
        self.decoder = Decoder(config) if config.decoder_config.layers else None
        self.logit_scale = LogitScale(config)
        self.post_init()

    def encode_image(self, pixel_values: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[batch, 3, height, width] (uint8, or floats already normalised) to what the two losses need.

        Returns:
            Embeddings [batch, embed_dim] of unit length, and picture tokens [batch, pooler queries - 1, embed_dim].
        """
        image_embeds, image_tokens = self.vision(pixel_values, keep)
        return F.normalize(image_embeds, dim=-1), image_tokens

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[batch, length], right-padded, to unit embeddings [batch, embed_dim] and states [batch, length, width].

        The number of real tokens comes from `lengths` [batch], else from `attention_mask` [batch, length], else from
        the pad id.
        """
        text_embeds, text_tokens = self.text(input_ids, self._lengths(input_ids, attention_mask, lengths))
        return F.normalize(text_embeds, dim=-1), text_tokens

    def decode(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Text states [batch, length, width] and picture tokens to states [batch, length, width] for the head."""
        return self._require_decoder()(text_tokens, image_tokens)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings of pictures, [batch, embed_dim], of unit length."""
        return F.normalize(self.vision(pixel_values, tokens=False)[0], dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings of texts, [batch, embed_dim], of unit length."""
        return self.encode_text(input_ids, attention_mask)[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        labels: Tensor | None = None,
        pictures: Pictures | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> MMScaleOutput | tuple:
        """Embeds pictures and texts, and predicts each text's next tokens from its picture where both are given.

        Args:
            input_ids: [batch, length], right-padded.
            pixel_values: [batch, 3, height, width], uint8 or normalised floats.
            attention_mask, lengths: the real tokens, see `encode_text`.
            labels: [batch, length], usually `input_ids` themselves; position t is predicted from the tokens before it;
                -100 and padding count for nothing.
            pictures, past_key_values, logits_to_keep: used by `generate`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if pictures is not None:
            logits = self._generation_step(input_ids, attention_mask, pictures, past_key_values, logits_to_keep)
            output = MMScaleOutput(logits=logits, past_key_values=past_key_values)
            return output if return_dict else output.to_tuple()
        output = MMScaleOutput()
        if pixel_values is not None:
            output.image_embeds, output.image_tokens = self.encode_image(pixel_values)
        if input_ids is not None:
            lengths = self._lengths(input_ids, attention_mask, lengths)
            output.text_embeds, text_tokens = self.encode_text(input_ids, lengths=lengths)
        if pixel_values is not None and input_ids is not None:
            scale, bias = self.logit_scale().unbind()
            output.logits_per_image = output.image_embeds @ output.text_embeds.T * scale + bias
            output.logits_per_text = output.logits_per_image.T
            if self.decoder is not None and pixel_values.shape[0] == input_ids.shape[0]:
                hidden = self.decode(text_tokens, output.image_tokens)
                output.logits = self.decoder.head(hidden)
                if labels is not None:
                    output.loss = _caption_loss(output.logits, labels, lengths)
        return output if return_dict else output.to_tuple()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text.tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.text.tokens = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.decoder.head if self.decoder is not None else None

    def kept_patches(self, positions: Tensor, seed: int) -> Tensor | None:
        """The patches that patch dropout leaves of the samples at these stream positions; None for all of them."""
        vision = self.config.vision_config
        if not (self.training and vision.patch_dropout):
            return None
        keep = max(1, round(vision.num_patches * (1 - vision.patch_dropout)))
        return kept_patches(positions, vision.num_patches, keep, seed)

    def set_activation_checkpointing(self, mode: str):
        """Which blocks are recomputed in the backward pass: `none`, `full`, or `every_N` (N-th of a part)."""
        every = {"none": 0, "full": 1}.get(mode)
        if every is None:
            prefix, _, number = mode.rpartition("_")
            if prefix != "every" or not number.isdigit() or int(number) < 1:
                raise ValueError(f"checkpoint: `{mode}` is not one of none, full, every_N")
            every = int(number)
        for blocks in self._block_stacks():
            for index, block in enumerate(blocks):
                block.gradient_checkpointing = bool(every) and index % every == every - 1
                block._gradient_checkpointing_func = partial(activation_checkpoint, use_reentrant=False)

    def compile_blocks(self, **options):
        """Compiles every block in place; blocks of a stack share one compiled graph. Options are `torch.compile`'s."""
        for blocks in self._block_stacks():
            for block in blocks:
                block.compile(**options)

    def _block_stacks(self) -> list[nn.ModuleList]:
        decoder = [self.decoder.blocks, self.decoder.cross_blocks] if self.decoder is not None else []
        return [self.vision.blocks, self.text.blocks, *decoder]

    def _lengths(self, input_ids: Tensor, attention_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        if lengths is not None:
            return lengths
        real = attention_mask if attention_mask is not None else input_ids != self.config.pad_token_id
        return real.long().sum(1)

    def _require_decoder(self) -> Decoder:
        if self.decoder is None:
            raise ValueError("this model has no decoder (decoder.layers is 0): it can embed, but not write captions")
        return self.decoder


def _caption_loss(logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """Mean cross entropy of the next token over real tokens."""
    position = torch.arange(1, labels.shape[1], device=labels.device)
    targets = labels[:, 1:].masked_fill(position >= lengths[:, None], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
