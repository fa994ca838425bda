"""Floating-point operations of the model, by formula: a multiplication and an addition are two.

Matrix products and attention are counted, as PyTorch's flop counter does; norms, activations and the losses' softmaxes
are not. Causal attention is counted in full, which is what the usual definition of MFU does
(https://arxiv.org/abs/2204.02311, appendix B).
"""

from .configuration_mmscale import MMScaleConfig
from .layers import cross_attention_flops, few_queries


def forward_flops(
    config: MMScaleConfig, text_length: float, contrastive: bool = True, caption: bool = True, training: bool = False
) -> float:
    """Of one sample's forward pass, with a text of `text_length` tokens (padding that is computed included, CLS not).

    `contrastive` and `caption` say which losses are trained: what only the other one needs is not computed. Patch
    dropout counts when `training`.
    """
    return (
        vision_flops(config, contrastive, caption, training)
        + text_flops(config, text_length, contrastive)
        + (decoder_flops(config, text_length - 1, training) if caption else 0.0)
    )


def training_flops(config: MMScaleConfig, text_length: float, contrastive: bool = True, caption: bool = True) -> float:
    """Of one sample's forward and backward pass. Recomputation is not counted.

    The backward pass does two products for each of the forward pass, but none for the gradient of the pixels.
    """
    patches = _visible_patches(config, training=True)
    vision = config.vision_config
    no_pixel_gradient = _linear(patches, 3 * vision.patch_size**2, vision.width)
    return 3 * forward_flops(config, text_length, contrastive, caption, training=True) - no_pixel_gradient


def vision_flops(
    config: MMScaleConfig, contrastive: bool = True, caption: bool = True, training: bool = False
) -> float:
    """Of one picture through the ViT, the pooler and the projection."""
    vision, width = config.vision_config, config.vision_config.width
    patches = _visible_patches(config, training)
    tokens = patches + int(vision.class_token)
    queries = (1 if contrastive else 0) + (vision.pooler_queries - 1 if caption else 0)
    pooler = (
        _linear(tokens, width, 2 * config.embed_dim)
        + _linear(queries, config.embed_dim, config.embed_dim)
        + _attention(queries, tokens, config.embed_dim)
    )
    return (
        _linear(patches, 3 * vision.patch_size**2, width)
        + vision.layers * _block(tokens, width, vision.mlp_ratio)
        + pooler
        + (_linear(patches, width, config.embed_dim) if caption and vision.patch_tokens else 0.0)
        + (_linear(1, config.embed_dim, config.embed_dim) if contrastive else 0.0)
    )


def text_flops(config: MMScaleConfig, text_length: float, contrastive: bool = True) -> float:
    """Of one text through the text tower, with its CLS token when the contrastive loss is trained."""
    text = config.text_config
    tokens = text_length + int(contrastive)
    projection = _linear(1, text.width, config.embed_dim) if contrastive else 0.0
    return text.layers * _block(tokens, text.width, text.mlp_ratio) + projection


def decoder_flops(config: MMScaleConfig, tokens: float, training: bool = False) -> float:
    """Of one text of so many input tokens through the decoder and the vocabulary head."""
    decoder, width = config.decoder_config, config.text_config.width
    if not decoder.layers:
        return 0.0
    vision = config.vision_config
    seen = vision.pooler_queries - 1
    if vision.patch_tokens:
        seen += _visible_patches(config, training)
    sizes = (tokens, seen, width, config.embed_dim, decoder.heads)
    mixing = cross_attention_flops(*sizes)["absorbed" if few_queries(*sizes) else "keys_values"]
    cross_block = 2 * _linear(tokens, width, width) + mixing + _mlp(tokens, width, decoder.mlp_ratio)
    layers = decoder.layers * (_block(tokens, width, decoder.mlp_ratio) + cross_block)
    return layers + _linear(tokens, width, config.vocab_size)


def _visible_patches(config: MMScaleConfig, training: bool) -> int:
    vision = config.vision_config
    return max(1, round(vision.num_patches * (1 - vision.patch_dropout))) if training else vision.num_patches


def _linear(rows: float, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


def _attention(queries: float, keys: float, width: int) -> float:
    return 4.0 * queries * keys * width


def _mlp(tokens: float, width: int, ratio: float) -> float:
    return 2 * _linear(tokens, width, int(width * ratio))


def _block(tokens: float, width: int, ratio: float) -> float:
    return 4 * _linear(tokens, width, width) + _attention(tokens, tokens, width) + _mlp(tokens, width, ratio)
