"""The layers that the towers are stacked from: attention, feed-forward, blocks, the attentional pooler.

Texts of a batch differ in length. Everything that works token by token runs on the real tokens of all texts in one row
(`Packing`); only attention sees the padded rectangle.

Every parameter is read only inside the forward of the module that owns it, so that sharded training (ZeRO-3), which
gathers a module's parameters around its forward, works however the parts are called.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .feed_forward import MLP, init_linear
from .linear import Linear, linear
from .prompts import KeyValuePrefix


class Packing(NamedTuple):
    """Where the real tokens are in a padded batch.

    `index` holds their places in the flattened batch [batch * length], in rising order.
    """

    index: Tensor
    batch: int
    length: int

    @classmethod
    def of(cls, real: Tensor) -> "Packing":
        """From a boolean [batch, length], True at real tokens. Waits for the device, so better made on the host."""
        return cls(real.flatten().nonzero().squeeze(1), *real.shape)

    def to(self, device: torch.device) -> "Packing":
        return self._replace(index=self.index.to(device, non_blocking=True))

    def pack(self, padded: Tensor) -> Tensor:
        """[batch, length, ...] to [tokens, ...]."""
        return _Pack.apply(padded, self.index)

    def pad(self, packed: Tensor) -> Tensor:
        """[tokens, ...] to [batch, length, ...], zeros elsewhere."""
        return _Pad.apply(packed, self.index, self.batch, self.length)


class _Pack(torch.autograd.Function):
    """No place occurs twice, so the gradient is a plain copy, which PyTorch's own indexing cannot know."""

    @staticmethod
    def forward(ctx, padded, index):
        ctx.save_for_backward(index)
        ctx.shape = padded.shape[:2]
        return padded.flatten(0, 1)[index]

    @staticmethod
    def backward(ctx, grad):
        return _scatter(grad, *ctx.saved_tensors, *ctx.shape), None


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, index, batch, length):
        ctx.save_for_backward(index)
        return _scatter(packed, index, batch, length)

    @staticmethod
    def backward(ctx, grad):
        return grad.flatten(0, 1)[ctx.saved_tensors[0]], None, None, None


def _scatter(packed: Tensor, index: Tensor, batch: int, length: int) -> Tensor:
    padded = packed.new_zeros(batch * length, *packed.shape[1:])
    padded[index] = packed
    return padded.unflatten(0, (batch, length))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, width] as [batch, heads, tokens, width / heads], without a copy."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, implementation: str
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention on [batch, heads, tokens, head width].

    Args:
        mask: boolean, True where a query may look, broadcast to [batch, heads, queries, keys]; None for everywhere.
        causal: the n-th query from the end sees up to the n-th key from the end. Not together with `mask`.
        implementation: `sdpa` (PyTorch's fused kernels) or `eager`, which also returns the attention weights.

    Returns:
        [batch, queries, heads * head width], and the weights [batch, heads, queries, keys] or None.
    """
    assert mask is None or not causal
    if causal and query.shape[2] != key.shape[2]:
        # PyTorch aligns a rectangular causal mask to the first key; a cached prefix needs it aligned to the last.
        mask = lower_right_causal_mask(query.shape[2], key.shape[2], query.device) if query.shape[2] > 1 else None
        causal = False
    if implementation != "eager":
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return mixed.transpose(1, 2).flatten(2), None
    if causal:
        mask = lower_right_causal_mask(query.shape[2], key.shape[2], query.device)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def lower_right_causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Boolean [queries, keys]: the last query sees every key, the one before it all but the last, and so on."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused matrix for queries, keys and values."""

    def __init__(self, config, width: int, heads: int, depth: int, layer_idx: int | None = None):
        super().__init__()
        self.config, self.heads, self.depth, self.layer_idx = config, heads, depth, layer_idx
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        tokens = getattr(config, "prefix_tokens", 0)
        self.prefix = KeyValuePrefix(tokens, width, heads) if tokens else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, tokens, width] (or packed) to the same, and the attention weights where `attend` gives them."""
        qkv = self.qkv(x)
        if packing is not None:
            qkv = packing.pad(qkv)
        query, key, value = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if self.prefix is not None:
            key, value, mask = self.prefix(key, value, mask)
        mixed, weights = attend(query, key, value, mask, causal, self.config._attn_implementation)
        return self.out(mixed if packing is None else packing.pack(mixed)), weights

    def reset_parameters(self):
        width = self.out.in_features
        init_linear(self.qkv, width**-0.5)
        init_linear(self.out, (2 * self.depth * width) ** -0.5)


class PictureKeyValue(nn.Module):
    """Layer norm of the picture tokens and their projection to keys and values, as one linear map.

    The norm's statistics are the same in every layer, so its input comes here already standardised, once for the whole
    decoder; what is a layer's own, the norm's gain and shift, is folded into the projection.
    """

    packed: tuple[Tensor, Tensor] | None = None  # the projection with the norm in it, while `packed_weights` is open

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_weight = nn.Parameter(torch.empty(context_width))
        self.norm_bias = nn.Parameter(torch.empty(context_width))
        self.weight = nn.Parameter(torch.empty(2 * width, context_width))  # keys above values
        self.bias = nn.Parameter(torch.empty(2 * width))

    def forward(self, context: Tensor, query: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """Keys and values, or with `query` the outcome of attention without making keys and values.

        Args:
            context: [pictures, picture tokens, context width], standardised.
            query: [pictures, queries, width].

        Returns:
            Keys and values, each [pictures, heads, picture tokens, head width]; or [pictures, queries, width].
        """
        weight, bias = self._folded() if self.packed is None or torch.is_grad_enabled() else self.packed
        if query is not None:
            return self._attend(context, query, weight, bias)
        key, value = linear(context, weight, bias).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def pack(self):
        if self.weight.numel():  # sharded training (ZeRO-3) holds it during `forward` only
            with torch.no_grad():
                self.packed = self._folded()

    def unpack(self):
        self.packed = None

    def _folded(self) -> tuple[Tensor, Tensor]:
        return self.weight * self.norm_weight, self.bias + self.weight @ self.norm_bias

    def _attend(self, context: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(q W_k) x instead of q (W_k x), and W_v (p x) instead of p (W_v x): a few queries are projected to the
        context's width rather than many picture tokens to the heads'. The bias of the keys adds the same to all scores
        of a query and drops out.
        """
        key_weight, value_weight = weight.unflatten(0, (2, self.heads, -1))  # each [heads, head width, context width]
        query = query.unflatten(-1, (self.heads, -1)) * key_weight.shape[1] ** -0.5
        query = torch.einsum("pthd,hdc->pthc", query, key_weight).flatten(1, 2)
        weights = (query @ context.transpose(1, 2)).softmax(-1)
        mixed = (weights.to(context.dtype) @ context).unflatten(1, (-1, self.heads))
        mixed = torch.einsum("pthc,hdc->pthd", mixed, value_weight).flatten(2)
        return mixed + bias.chunk(2)[1]

    def reset_parameters(self):
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)


class CrossAttention(nn.Module):
    """Multi-head attention from text to picture tokens."""

    def __init__(self, config, width: int, context_width: int, heads: int, depth: int):
        super().__init__()
        self.config, self.heads, self.depth = config, heads, depth
        self.query = Linear(width, width)
        self.key_value = PictureKeyValue(width, context_width, heads)
        self.out = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        key_value: tuple[Tensor, Tensor] | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, tokens, width] (or packed) to the same; see `CrossBlock.forward`."""
        query = self.query(x)
        if packing is not None:
            query = packing.pad(query)
        mixed, weights = self._mix(query, context, key_value)
        return self.out(mixed if packing is None else packing.pack(mixed)), weights

    def _mix(
        self, query: Tensor, context: Tensor | None, key_value: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        implementation = self.config._attn_implementation
        shape, pictures = query.shape, len(context if key_value is None else key_value[0])
        # Attention to a picture has no order, so the beams of a picture are more queries to the same keys.
        query = query.reshape(pictures, -1, query.shape[-1])
        if key_value is None:
            few = few_queries(query.shape[1], context.shape[1], query.shape[2], context.shape[2], self.heads)
            if few and implementation != "eager":
                return self.key_value(context, query).reshape(shape), None
            key_value = self.key_value(context)
        mixed, weights = attend(split_heads(query, self.heads), *key_value, None, False, implementation)
        return mixed.reshape(shape), weights

    def reset_parameters(self):
        width = self.out.in_features
        init_linear(self.query, width**-0.5)
        init_linear(self.out, (2 * self.depth * width) ** -0.5)


def cross_attention_flops(queries: float, keys: float, width: int, context_width: int, heads: int) -> dict[str, float]:
    """What `CrossAttention` costs between its query and output projections: with keys and values, and without."""
    return {
        "keys_values": 4.0 * keys * context_width * width + 4.0 * queries * keys * width,
        "absorbed": 4.0 * queries * width * context_width + 4.0 * queries * heads * keys * context_width,
    }


def few_queries(queries: float, keys: float, width: int, context_width: int, heads: int) -> bool:
    """Whether making keys and values costs clearly more than attending without them."""
    flops = cross_attention_flops(queries, keys, width, context_width, heads)
    return flops["absorbed"] < 0.8 * flops["keys_values"]


class Block(GradientCheckpointingLayer):
    """Pre-norm Transformer block: self-attention, then feed-forward.

    `depth` is the number of residual blocks of the stack, which the initialisation of the output layers depends on.
    """

    def __init__(self, config, width: int, heads: int, mlp_ratio: float, depth: int, layer_idx: int | None = None):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config, width, heads, depth, layer_idx)
        self.norm_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, mlp_ratio, config.activation, depth)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """[batch, tokens, width], or packed [tokens, width], to the same; `mask` and `causal` as in `attend`."""
        x = x + self.attention(self.norm_1(x), mask, causal, past_key_values, packing)[0]
        return x + self.mlp(self.norm_2(x))


class CrossBlock(GradientCheckpointingLayer):
    """Pre-norm block: attention to picture tokens, then feed-forward."""

    def __init__(self, config, width: int, context_width: int, heads: int, mlp_ratio: float, depth: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = CrossAttention(config, width, context_width, heads, depth)
        self.norm_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, mlp_ratio, config.activation, depth)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        key_value: tuple[Tensor, Tensor] | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """[batch, tokens, width], or packed [tokens, width], to the same.

        Args:
            context: [pictures, picture tokens, context width], standardised; or None and
            key_value: what `PictureKeyValue` made of it. The batch may hold several texts (beams) of each picture.
        """
        x = x + self.attention(self.norm_1(x), context, key_value, packing)[0]
        return x + self.mlp(self.norm_2(x))


class AttentionalPooler(nn.Module):
    """A fixed number of learned queries that attend to the patches (https://arxiv.org/abs/2205.01917, section 3.2)."""

    def __init__(self, config, width: int, heads: int, queries: int):
        super().__init__()
        self.config, self.heads = config, heads
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.norm_queries = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm_context = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.query = Linear(width, width)
        self.key_value = Linear(config.width, 2 * width)
        self.out = Linear(width, width)

    def forward(
        self, patches: Tensor, start: int = 0, stop: int | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, patches, vision width] to [batch, queries, width] for the queries from `start` to `stop`.

        With `shift` [batch or 1, guides, width] the first of them is replaced by itself plus each of these.
        """
        batch = patches.shape[0]
        queries = self.queries[start:stop].unsqueeze(0)  # the same for every picture
        if shift is not None:
            queries = torch.cat([queries[:, :1] + shift, queries[:, 1:].expand(len(shift), -1, -1)], dim=1)
        query = self.query(self.norm_queries(queries))
        query = split_heads(query, self.heads).expand(batch, -1, -1, -1)
        key, value = self.key_value(self.norm_context(patches)).chunk(2, dim=-1)
        key, value = split_heads(key, self.heads), split_heads(value, self.heads)
        mixed, weights = attend(query, key, value, None, False, self.config._attn_implementation)
        return self.out(mixed), weights

    def reset_parameters(self):
        width = self.out.in_features
        nn.init.normal_(self.queries)
        init_linear(self.query, width**-0.5)
        init_linear(self.key_value, self.key_value.in_features**-0.5)
        init_linear(self.out, width**-0.5)
