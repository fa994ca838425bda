"""The image tower: patches, ViT blocks, attentional pooler."""

import torch
from torch import Tensor, nn
from transformers import initialization

from .configuration_mmscale import MMScaleConfig, MMScaleVisionConfig
from .feed_forward import init_linear
from .layers import AttentionalPooler, Block
from .linear import Linear
from .prompts import PoolingGuide, VisionPrompts


class PatchTokens(nn.Module):
    """Every patch as a picture token: what the trunk makes of it, projected, and where it is.

    What is pooled for captions need not hold what these do not say, such as where things are, and neither need a
    patch's own state after the last block. So places are stated anew, as large as the rest.
    """

    def __init__(self, vision: MMScaleVisionConfig, embed_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        self.projection = Linear(vision.width, embed_dim)
        self.places = nn.Parameter(torch.empty(vision.num_patches, embed_dim))

    def forward(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        """[batch, patches, width], all or those in `keep` [batch, kept], to [batch, patches, embed_dim]."""
        places = self.places if keep is None else self.places[keep]
        return self.projection(self.norm(patches)) + places

    def reset_parameters(self):
        init_linear(self.projection, self.projection.in_features**-0.5)
        nn.init.normal_(self.places)


class VisionTower(nn.Module):
    """ViT and attentional pooler. uint8 pictures are normalised here, on the device they are on."""

    def __init__(self, config: MMScaleConfig):
        super().__init__()
        vision = config.vision_config
        self.config = vision
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.patch_embedding = Linear(3 * vision.patch_size**2, vision.width, bias=vision.patch_bias)
        self.class_token = nn.Parameter(torch.empty(vision.width)) if vision.class_token else None
        self.positions = nn.Parameter(torch.empty(vision.num_patches + int(vision.class_token), vision.width))
        self.norm_pre = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps) if vision.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(vision, vision.width, vision.heads, vision.mlp_ratio, vision.layers) for _ in range(vision.layers)
        )
        self.pooler = AttentionalPooler(vision, config.embed_dim, vision.pooler_heads, vision.pooler_queries)
        self.norm_pooled = nn.LayerNorm(config.embed_dim, eps=vision.layer_norm_eps)
        self.projection = Linear(config.embed_dim, config.embed_dim, bias=False)
        self.unpooled = PatchTokens(vision, config.embed_dim) if vision.patch_tokens else None
        self.prompts = self.guide = None
        if vision.prompt_tokens:
            self.prompts = VisionPrompts(vision.prompt_tokens, vision.width, vision.layers, vision.prompt_depth)
        if vision.guided_pooling:
            self.guide = PoolingGuide(config.embed_dim)

    def forward(
        self,
        pixel_values: Tensor,
        keep: Tensor | None = None,
        embed: bool = True,
        tokens: bool = True,
        guide: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """[batch, 3, height, width] to the embedding [batch, embed_dim], not normalised, and the picture tokens.

        Args:
            pixel_values: uint8, or floats that are already normalised.
            keep: int64 [batch, kept], the patches to look at; all when None.
            embed, tokens: what is wanted; the rest is None and is not computed.
            guide: [batch or 1, embed_dim], the embedding of a text that says what the image embedding is to be about;
                or several for each picture, [batch or 1, guides, embed_dim], and so many image embeddings.

        Raises:
            ValueError: a guide for a model without guided pooling.
        """
        if guide is not None and self.guide is None:
            raise ValueError("this model was not tuned to be guided by a text (vision_config.guided_pooling)")
        x = self.trunk(pixel_values, keep)
        if embed and guide is not None:
            return self._guided(x, keep, tokens, guide)
        pooled, _ = self.pooler(x, 0 if embed else 1, None if tokens else 1)
        pooled = self.norm_pooled(pooled)
        image_embeds = self.projection(pooled[:, 0]) if embed else None
        return image_embeds, (self._tokens(pooled[:, int(embed) :], x, keep) if tokens else None)

    def _guided(self, x: Tensor, keep: Tensor | None, tokens: bool, guide: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, gain, offset = self.guide(guide if guide.ndim == 3 else guide[:, None])
        pooled, _ = self.pooler(x, 0, None if tokens else 1, shift)
        pooled = self.norm_pooled(pooled)
        first, rest = pooled[:, : shift.shape[1]], pooled[:, shift.shape[1] :]
        image_embeds = self.projection(first * (1 + gain) + offset)
        image_tokens = self._tokens(rest, x, keep) if tokens else None
        return image_embeds if guide.ndim == 3 else image_embeds[:, 0], image_tokens

    def _tokens(self, pooled: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
        """What the decoder sees: what is pooled, and with `patch_tokens` what it is pooled of."""
        if self.unpooled is None:
            return pooled
        patches = x if self.class_token is None else x[:, 1:]
        return torch.cat([pooled, self.unpooled(patches, keep)], dim=1)

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
        for layer, block in enumerate(self.blocks):
            x = block(x if self.prompts is None else self.prompts(x, layer))
        return x if self.prompts is None else self.prompts.without(x)

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """[batch, patches, 3 * patch size squared], channels first as in a convolution's weight."""
        size = self.config.patch_size
        x = pixel_values.unfold(2, size, size).unfold(3, size, size)  # [batch, 3, rows, columns, size, size]
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(4).flatten(1, 2)  # [batch, patches, 3, size * size]
        dtype = self.positions.dtype
        if not pixel_values.is_floating_point():
            mean = torch.tensor(self.image_mean, device=x.device)[:, None] * 255
            std = torch.tensor(self.image_std, device=x.device)[:, None] * 255
            x = (x - mean) / std
        return x.flatten(2).to(dtype)

    def reset_parameters(self):
        scale = self.config.width**-0.5
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=scale)
        with torch.no_grad():
            initialization.copy_(self.positions, self._initial_positions(scale))
        nn.init.normal_(self.patch_embedding.weight, std=self.patch_embedding.in_features**-0.5)
        if self.patch_embedding.bias is not None:
            nn.init.zeros_(self.patch_embedding.bias)
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)

    def _initial_positions(self, scale: float) -> Tensor:
        """Waves along both axes, so that near and far can be told from the start; they are learned from there on.

        The frequencies are those of Beyer et al., "Better plain ViT baselines for ImageNet-1k" (2022), which keeps them
        fixed. Seen once on toy shards: captions were exact sooner than with positions drawn at random.
        """
        like = {"device": self.positions.device, "dtype": torch.float32}
        side = self.config.image_size // self.config.patch_size
        bands = -(-self.config.width // 4)
        frequencies = 10_000 ** -(torch.arange(bands, **like) / max(bands - 1, 1))
        rows, columns = (axis.flatten() for axis in torch.meshgrid([torch.arange(side, **like)] * 2, indexing="ij"))
        phases = [axis[:, None] * frequencies for axis in (columns, rows)]
        waves = torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], dim=1)
        grid = 0.5 * waves[:, : self.config.width]
        class_position = torch.randn(self.positions.shape[0] - grid.shape[0], grid.shape[1], **like) * scale
        return torch.cat([class_position, grid])
