"""Learned prompts: a few parameters that steer a model whose weights may stay as they are. All are off by default.

VisionPrompts    tokens beside the patches (VPT, https://arxiv.org/abs/2203.12119)
PoolingGuide     a text's embedding that says what the image embedding should be about
ClassPrompts     context vectors before class names, in the text tower (CoOp, https://arxiv.org/abs/2109.01134)
KeyValuePrefix   keys and values before the text, in the decoder (prefix tuning, https://arxiv.org/abs/2101.00190)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mmscale import MMScaleConfig

CONTEXT_KINDS = ("unified", "class", "image")
CONDITION_SHRINK = 16  # the bottleneck of CoCoOp's network, against the embedding


class VisionPrompts(nn.Module):
    """Tokens beside the patches: before the first block (`shallow`), or others before every block (`deep`)."""

    def __init__(self, tokens: int, width: int, layers: int, depth: str):
        super().__init__()
        if depth not in ("shallow", "deep"):
            raise ValueError(f"prompt_depth: `{depth}` is neither shallow nor deep")
        self.tokens, self.deep = tokens, depth == "deep"
        self.vectors = nn.Parameter(torch.empty(layers if self.deep else 1, tokens, width))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        """[batch, tokens, width] to what block number `layer` reads, with the prompts at the end."""
        if layer and not self.deep:
            return x
        patches = x[:, : -self.tokens] if layer else x
        return torch.cat([patches, self.vectors[layer].to(x.dtype).expand(len(x), -1, -1)], dim=1)

    def without(self, x: Tensor) -> Tensor:
        """The last block's output without the prompts."""
        return x[:, : -self.tokens]

    def reset_parameters(self):
        nn.init.normal_(self.vectors, std=self.vectors.shape[-1] ** -0.5)


class PoolingGuide(nn.Module):
    """From a text's embedding: where query 0 looks, and a gain and an offset on what it finds.

    It starts at zero: an untrained guide changes nothing.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))

    def forward(self, guide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch or 1, embed_dim] to three of that shape: what is added to the query, the gain less 1, the offset."""
        return F.linear(guide, self.weight).chunk(3, dim=-1)

    def reset_parameters(self):
        nn.init.zeros_(self.weight)


class ClassPrompts(nn.Module):
    """Class embeddings from [start] [context vectors] class name [end].

    The context is one for all classes (`unified`), one for each (`class`), or one that the picture shifts (`image`,
    https://arxiv.org/abs/2203.05557).
    """

    def __init__(self, config: MMScaleConfig):
        super().__init__()
        prompts, width = config.class_prompts, config.text_config.width
        self.kind, self.num_context = prompts["kind"], prompts["context_tokens"]
        if self.kind not in CONTEXT_KINDS:
            raise ValueError(f"class_prompts: the kind `{self.kind}` is not one of {', '.join(CONTEXT_KINDS)}")
        self.names = prompts["names"]
        self.rows = [
            [config.bos_token_id, *[config.pad_token_id] * self.num_context, *ids, config.eos_token_id]
            for ids in prompts["token_ids"]
        ]
        if (longest := max(map(len, self.rows))) > config.text_config.context_length:
            raise ValueError(
                f"class_prompts: with {self.num_context} context vectors the longest class name has {longest} tokens, "
                f"more than context_length {config.text_config.context_length}"
            )
        self.pad_id = config.pad_token_id
        self.context = nn.Parameter(torch.empty(len(self.rows) if self.kind == "class" else 1, self.num_context, width))
        if self.kind == "image":
            hidden = max(1, config.embed_dim // CONDITION_SHRINK)
            self.condition_in = nn.Linear(config.embed_dim, hidden)
            self.condition_out = nn.Linear(hidden, width)

    def forward(self, text: nn.Module, image_embeds: Tensor | None = None) -> Tensor:
        """Unit embeddings of the classes, [classes, embed_dim]; of kind `image`, [batch, classes, embed_dim].

        Args:
            text: the text tower.
            image_embeds: [batch, embed_dim], for the kind `image`.
        """
        input_ids, lengths = self._token_ids(self.context.device)
        context = self.context.expand(len(self.rows), -1, -1)
        batch = None
        if self.kind == "image":
            batch = len(image_embeds)
            shift = self.condition_out(F.relu(self.condition_in(image_embeds)))
            context = (context + shift[:, None, None]).flatten(0, 1)  # [batch * classes, context, width]
            input_ids, lengths = input_ids.repeat(batch, 1), lengths.repeat(batch)
        embeds, _ = text(input_ids, lengths, context=context)
        embeds = F.normalize(embeds, dim=-1)
        return embeds if batch is None else embeds.unflatten(0, (batch, -1))

    def _token_ids(self, device: torch.device) -> tuple[Tensor, Tensor]:
        longest = max(map(len, self.rows))
        padded = [row + [self.pad_id] * (longest - len(row)) for row in self.rows]
        return torch.tensor(padded, device=device), torch.tensor([len(row) for row in self.rows], device=device)

    def reset_parameters(self):
        nn.init.normal_(self.context, std=0.02)
        if self.kind == "image":
            nn.init.normal_(self.condition_in.weight, std=self.condition_in.in_features**-0.5)
            nn.init.zeros_(self.condition_in.bias)
            nn.init.zeros_(self.condition_out.weight)  # the picture shifts nothing at the start
            nn.init.zeros_(self.condition_out.bias)


class KeyValuePrefix(nn.Module):
    """Keys and values that every token of the text sees, before its own."""

    def __init__(self, tokens: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.key, self.value = (nn.Parameter(torch.empty(tokens, width)) for _ in range(2))

    def forward(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [batch, heads, tokens, head width], and the mask over them, with the prefix in front."""
        if mask is not None:
            mask = F.pad(mask, (len(self.key), 0), value=True)
        return self._before(self.key, key), self._before(self.value, value), mask

    def _before(self, prefix: Tensor, own: Tensor) -> Tensor:
        prefix = prefix.to(own.dtype).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        return torch.cat([prefix.expand(len(own), -1, -1, -1), own], dim=2)

    def reset_parameters(self):
        nn.init.normal_(self.key, std=1.0)
        nn.init.zeros_(self.value)
