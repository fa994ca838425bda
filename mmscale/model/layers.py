"""The layers that the towers are stacked from: attention, feed-forward, blocks, the attentional pooler.

Every parameter is read only inside the forward of the module that owns it, so that sharded training (ZeRO-3), which
gathers a module's parameters around its forward, works however the parts are called.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU that SigLIP was trained with."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}


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
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, tokens, width] to the same, and the attention weights where the implementation gives them."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        mixed, weights = attend(query, key, value, mask, causal, self.config._attn_implementation)
        return self.out(mixed), weights

    def reset_parameters(self):
        width = self.out.in_features
        _init_linear(self.qkv, width**-0.5)
        _init_linear(self.out, (2 * self.depth * width) ** -0.5)


class CrossAttention(nn.Module):
    """Multi-head attention from text to picture tokens."""

    def __init__(self, config, width: int, context_width: int, heads: int, depth: int):
        super().__init__()
        self.config, self.heads, self.depth = config, heads, depth
        self.norm_context = nn.LayerNorm(context_width, eps=config.layer_norm_eps)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[pictures, tokens, context width] to keys and values, each [pictures, heads, tokens, head width]."""
        key, value = self.key_value(self.norm_context(context)).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """[batch, tokens, width] to the same. `batch` is a multiple of the pictures when several beams share one."""
        batch, pictures = x.shape[0], key.shape[0]
        # Attention to a picture has no order, so the beams of a picture are more queries to the same keys.
        query = split_heads(self.query(x).view(pictures, -1, x.shape[-1]), self.heads)
        mixed, weights = attend(query, key, value, None, False, self.config._attn_implementation)
        return self.out(mixed.view(batch, -1, mixed.shape[-1])), weights

    def reset_parameters(self):
        width = self.out.in_features
        _init_linear(self.query, width**-0.5)
        _init_linear(self.key_value, self.key_value.in_features**-0.5)
        _init_linear(self.out, (2 * self.depth * width) ** -0.5)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config, width: int, mlp_ratio: float, depth: int):
        super().__init__()
        self.depth = depth
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(width, int(width * mlp_ratio))
        self.down = nn.Linear(int(width * mlp_ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def reset_parameters(self):
        width = self.up.in_features
        _init_linear(self.up, (2 * width) ** -0.5)
        _init_linear(self.down, (2 * self.depth * width) ** -0.5)


class Block(GradientCheckpointingLayer):
    """Pre-norm Transformer block: self-attention, then feed-forward.

    `depth` is the number of residual blocks of the stack, which the initialisation of the output layers depends on.
    """

    def __init__(self, config, width: int, heads: int, mlp_ratio: float, depth: int, layer_idx: int | None = None):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config, width, heads, depth, layer_idx)
        self.norm_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(config, width, mlp_ratio, depth)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, past_key_values: Cache | None = None
    ) -> Tensor:
        """[batch, tokens, width] to the same; `mask`, `causal` as in `attend`."""
        x = x + self.attention(self.norm_1(x), mask, causal, past_key_values)[0]
        return x + self.mlp(self.norm_2(x))


class CrossBlock(GradientCheckpointingLayer):
    """Pre-norm block: attention to picture tokens, then feed-forward."""

    def __init__(self, config, width: int, context_width: int, heads: int, mlp_ratio: float, depth: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = CrossAttention(config, width, context_width, heads, depth)
        self.norm_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(config, width, mlp_ratio, depth)

    def forward(
        self, x: Tensor, image_tokens: Tensor | None, keys_values: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """[batch, tokens, width] to the same, from the picture tokens or from keys and values made of them before."""
        key, value = keys_values if keys_values is not None else self.attention.keys_values(image_tokens)
        x = x + self.attention(self.norm_1(x), key, value)[0]
        return x + self.mlp(self.norm_2(x))


class AttentionalPooler(nn.Module):
    """A fixed number of learned queries that attend to the patches (https://arxiv.org/abs/2205.01917, section 3.2)."""

    def __init__(self, config, width: int, heads: int, queries: int):
        super().__init__()
        self.config, self.heads = config, heads
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.norm_queries = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm_context = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(config.width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, patches: Tensor, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor | None]:
        """[batch, patches, vision width] to [batch, queries, width] for the queries from `start` to `stop`."""
        batch = patches.shape[0]
        query = self.query(self.norm_queries(self.queries[start:stop]))  # the same for every picture
        query = split_heads(query.unsqueeze(0), self.heads).expand(batch, -1, -1, -1)
        key, value = self.key_value(self.norm_context(patches)).chunk(2, dim=-1)
        key, value = split_heads(key, self.heads), split_heads(value, self.heads)
        mixed, weights = attend(query, key, value, None, False, self.config._attn_implementation)
        return self.out(mixed), weights

    def reset_parameters(self):
        width = self.out.in_features
        nn.init.normal_(self.queries)
        _init_linear(self.query, width**-0.5)
        _init_linear(self.key_value, self.key_value.in_features**-0.5)
        _init_linear(self.out, width**-0.5)


def kept_patches(positions: Tensor, num_patches: int, keep: int, seed: int) -> Tensor:
    """Which patches survive patch dropout: a pure function of (seed, position of the sample in the stream).

    A 64-bit mixing function (the finaliser of splitmix64, http://xoshiro.di.unimi.it/splitmix64.c) ranks the patches of
    every sample, and the `keep` smallest stay. Integer arithmetic gives the same answer on every device.

    Args:
        positions: int64 [batch].

    Returns:
        int64 [batch, keep], in rising order.
    """
    patch = torch.arange(num_patches, device=positions.device)
    x = _mix64(positions + _mix64(torch.tensor(seed, device=positions.device)))
    x = _mix64(x[:, None] + (patch + 1) * _GOLDEN_GAMMA)
    return x.argsort(dim=1)[:, :keep].sort(dim=1).values


_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers, which wrap around as unsigned ones do


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's shifts of signed integers copy the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _init_linear(linear: nn.Linear, std: float):
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
