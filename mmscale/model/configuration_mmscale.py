"""Sizes and settings of an mmscale model, as they are saved in `config.json`."""

import math
from typing import ClassVar

from transformers import PretrainedConfig


class MMScaleVisionConfig(PretrainedConfig):
    """The image tower: a ViT and the attentional pooler on top of it.

    `pooler_queries` counts all queries: query 0 gives the image embedding, the others feed the decoder.
    `class_token`, `pre_norm`, `patch_bias` and `activation` let the tower hold trunks that were trained elsewhere.
    `patch_dropout` is the share of patches that a training pass leaves out (https://arxiv.org/abs/2212.00794).
    With `patch_tokens` the decoder also sees the patches themselves, beside what is pooled of them.
    `prompt_tokens` stand beside the patches, before the first block (`prompt_depth: shallow`) or before every one
    (`deep`); `guided_pooling` lets a text steer the image embedding.
    """

    model_type = "mmscale_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        pooler_queries: int = 256,
        pooler_heads: int = 8,
        class_token: bool = True,
        pre_norm: bool = True,
        patch_bias: bool = False,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-5,
        patch_dropout: float = 0.0,
        patch_tokens: bool = False,
        prompt_tokens: int = 0,
        prompt_depth: str = "shallow",
        guided_pooling: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = patch_size
        self.width = width
        self.layers = layers
        self.heads = heads
        self.mlp_ratio = mlp_ratio
        self.pooler_queries = pooler_queries
        self.pooler_heads = pooler_heads
        self.class_token = class_token
        self.pre_norm = pre_norm
        self.patch_bias = patch_bias
        self.activation = activation
        self.layer_norm_eps = layer_norm_eps
        self.patch_dropout = patch_dropout
        self.patch_tokens = patch_tokens
        self.prompt_tokens = prompt_tokens
        self.prompt_depth = prompt_depth
        self.guided_pooling = guided_pooling

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class MMScaleTextConfig(PretrainedConfig):
    """The causal text tower. `context_length` counts caption tokens with their start and end marks, without CLS."""

    model_type = "mmscale_text"
    base_config_key = "text_config"

    def __init__(
        self,
        context_length: int = 76,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-5,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.context_length = context_length
        self.width = width
        self.layers = layers
        self.heads = heads
        self.mlp_ratio = mlp_ratio
        self.activation = activation
        self.layer_norm_eps = layer_norm_eps


class MMScaleDecoderConfig(PretrainedConfig):
    """The multimodal decoder, as wide as the text tower. Without layers the model is a plain dual encoder (CLIP).

    `prefix_tokens` learned keys and values stand before the text in the self-attention of every layer.
    """

    model_type = "mmscale_decoder"
    base_config_key = "decoder_config"

    def __init__(
        self,
        layers: int = 12,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-5,
        prefix_tokens: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.layers = layers
        self.heads = heads
        self.mlp_ratio = mlp_ratio
        self.activation = activation
        self.layer_norm_eps = layer_norm_eps
        self.prefix_tokens = prefix_tokens


class MMScaleConfig(PretrainedConfig):
    """The whole model.

    Args:
        vision_config, text_config, decoder_config: the parts, as dictionaries or configuration objects.
        embed_dim: size of the shared embedding, which is also the width of the picture tokens.
        vocab_size: rows of the token table and of the vocabulary head.
        image_mean, image_std: per channel, of pixels between 0 and 1.
        logit_scale_init: logarithm of the contrastive temperature's inverse at the start.
        logit_scale_max: upper bound of the logit scale itself (not of its logarithm).
        logit_bias_init: start of the additive bias of the sigmoid loss; None leaves the bias out.
        legacy_cls_mask: the text embedding sees the first pad and not itself, as weights trained with open_clip's
            default expect.
        heads: name -> settings of a task head: `kind`, `fusion`, `labels` (or `outputs`), `hidden`; see `heads.py`.
        class_prompts: classes with learned context vectors before their names: `names`, `token_ids` (the pieces of each
            name), `context_tokens`, and `kind` (`unified`, `class` or `image`).
        int8: the weights of linear layers and embeddings are held in 8 bits; see `int8.py`.
    """

    model_type = "mmscale"
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
        "vision_config": MMScaleVisionConfig,
        "text_config": MMScaleTextConfig,
        "decoder_config": MMScaleDecoderConfig,
    }

    def __init__(
        self,
        vision_config: dict | MMScaleVisionConfig | None = None,
        text_config: dict | MMScaleTextConfig | None = None,
        decoder_config: dict | MMScaleDecoderConfig | None = None,
        embed_dim: int = 512,
        vocab_size: int = 49408,
        pad_token_id: int = 0,
        bos_token_id: int = 2,
        eos_token_id: int = 3,
        image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711),
        logit_scale_init: float = math.log(1 / 0.07),
        logit_scale_max: float = 100.0,
        logit_bias_init: float | None = None,
        legacy_cls_mask: bool = False,
        heads: dict[str, dict] | None = None,
        class_prompts: dict | None = None,
        int8: bool = False,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.vision_config = _sub_config(vision_config, MMScaleVisionConfig)
        self.text_config = _sub_config(text_config, MMScaleTextConfig)
        self.decoder_config = _sub_config(decoder_config, MMScaleDecoderConfig)
        self.embed_dim = embed_dim
        self.vocab_size = vocab_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.logit_scale_init = logit_scale_init
        self.logit_scale_max = logit_scale_max
        self.logit_bias_init = logit_bias_init
        self.legacy_cls_mask = legacy_cls_mask
        self.heads = heads or {}
        self.class_prompts = class_prompts
        self.int8 = int8
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "MMScaleConfig":
        """This object: what generation asks of a text configuration (vocabulary, special tokens) lives here."""
        return self


def _sub_config(value: dict | PretrainedConfig | None, kind: type[PretrainedConfig]) -> PretrainedConfig:
    if value is None:
        return kind()
    return kind(**value) if isinstance(value, dict) else value
