"""Named model sizes, and the model a run's configuration asks for."""

from typing import Any

from .configuration_mmscale import MMScaleConfig
from .modeling_mmscale import MMScaleModel

# b32 and l14 have the sizes of open_clip's coca_ViT-B-32 and coca_ViT-L-14; b16 is b32 with smaller patches; g14 has
# the image tower of ViT-g-14. `tiny` learns the toy shards on two CPU cores.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 128,
        "vision": {
            "image_size": 64,
            "patch_size": 16,
            "width": 128,
            "layers": 4,
            "heads": 4,
            "mlp_ratio": 4.0,
            "pooler_queries": 9,
            "pooler_heads": 4,
        },
        "text": {"context_length": 32, "width": 128, "layers": 2, "heads": 4, "mlp_ratio": 4.0},
        "decoder": {"layers": 2, "heads": 4, "mlp_ratio": 4.0},
    },
    "b32": {
        "embed_dim": 512,
        "vision": {
            "image_size": 224,
            "patch_size": 32,
            "width": 768,
            "layers": 12,
            "heads": 12,
            "mlp_ratio": 4.0,
            "pooler_queries": 256,
            "pooler_heads": 8,
        },
        "text": {"context_length": 76, "width": 512, "layers": 12, "heads": 8, "mlp_ratio": 4.0},
        "decoder": {"layers": 12, "heads": 8, "mlp_ratio": 4.0},
    },
    "b16": {
        "embed_dim": 512,
        "vision": {
            "image_size": 224,
            "patch_size": 16,
            "width": 768,
            "layers": 12,
            "heads": 12,
            "mlp_ratio": 4.0,
            "pooler_queries": 256,
            "pooler_heads": 8,
        },
        "text": {"context_length": 76, "width": 512, "layers": 12, "heads": 8, "mlp_ratio": 4.0},
        "decoder": {"layers": 12, "heads": 8, "mlp_ratio": 4.0},
    },
    "l14": {
        "embed_dim": 768,
        "vision": {
            "image_size": 224,
            "patch_size": 14,
            "width": 1024,
            "layers": 24,
            "heads": 16,
            "mlp_ratio": 4.0,
            "pooler_queries": 256,
            "pooler_heads": 8,
        },
        "text": {"context_length": 76, "width": 768, "layers": 12, "heads": 12, "mlp_ratio": 4.0},
        "decoder": {"layers": 12, "heads": 12, "mlp_ratio": 4.0},
    },
    "g14": {
        "embed_dim": 1024,
        "vision": {
            "image_size": 224,
            "patch_size": 14,
            "width": 1408,
            "layers": 40,
            "heads": 16,
            "mlp_ratio": 4.3637,
            "pooler_queries": 256,
            "pooler_heads": 16,
        },
        "text": {"context_length": 76, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0},
        "decoder": {"layers": 12, "heads": 16, "mlp_ratio": 4.0},
    },
}

# The sigmoid loss starts where almost every pair counts as unlike (https://arxiv.org/abs/2303.15343, section 3.2).
SIGLIP_LOGIT_SCALE_INIT = 2.302585092994046  # log 10
SIGLIP_LOGIT_BIAS_INIT = -10.0


def build_model_config(
    model: Any, vocab_size: int, pad_id: int = 0, bos_id: int = 2, eos_id: int = 3, contrastive: str = "clip"
) -> MMScaleConfig:
    """The sizes of a preset with the user's own over them.

    Args:
        model: the `model` section of a run's configuration: `preset`, `embed_dim`, `vision`, `text`, `decoder`, ...
        contrastive: `clip` or `siglip`; the latter gives the logit scale a bias and its own start.

    Raises:
        ValueError: when sizes do not fit together.
    """
    preset = PRESETS[model.preset]
    sizes = {part: {**preset[part], **_given(getattr(model, part))} for part in ("vision", "text", "decoder")}
    vision, text, decoder = sizes["vision"], sizes["text"], sizes["decoder"]
    embed_dim = model.embed_dim or preset["embed_dim"]
    for key, total, divisor in (
        ("vision.image_size by vision.patch_size", vision["image_size"], vision["patch_size"]),
        ("vision.width by vision.heads", vision["width"], vision["heads"]),
        ("embed_dim by vision.pooler_heads", embed_dim, vision["pooler_heads"]),
        ("text.width by text.heads", text["width"], text["heads"]),
        ("text.width by decoder.heads", text["width"], decoder["heads"]),
    ):
        if total % divisor:
            raise ValueError(f"model: cannot divide {key} ({total} by {divisor})")
    if decoder["layers"] and vision["pooler_queries"] < 2:
        raise ValueError(
            "model.vision.pooler_queries: the decoder needs at least one query besides the contrastive one"
        )
    prompts = model.prompts
    siglip = {"logit_scale_init": SIGLIP_LOGIT_SCALE_INIT, "logit_bias_init": SIGLIP_LOGIT_BIAS_INIT}
    return MMScaleConfig(
        vision_config={
            **vision,
            "patch_dropout": model.patch_dropout,
            "patch_tokens": model.patch_tokens,
            "prompt_tokens": prompts.image_tokens,
            "prompt_depth": prompts.image_depth,
            "guided_pooling": prompts.guided_pooling,
        },
        text_config=text,
        decoder_config={**decoder, "prefix_tokens": prompts.prefix_tokens},
        embed_dim=embed_dim,
        vocab_size=vocab_size,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        legacy_cls_mask=model.legacy_cls_mask,
        class_prompts=prompts.classes.model_dump() if prompts.classes else None,
        heads={name: head.model_dump(mode="json") for name, head in model.heads.items()},
        **(siglip if contrastive == "siglip" else {}),
    )


def build_model(config: MMScaleConfig, checkpoint: str = "none", compile: bool = False) -> MMScaleModel:
    """A freshly initialised model, with activation checkpointing and compilation as asked for.

    Args:
        checkpoint: `none`, `full` or `every_N`, as `MMScaleModel.set_activation_checkpointing` takes it.
        compile: whether the blocks go through `torch.compile`.
    """
    model = MMScaleModel(config)
    model.set_activation_checkpointing(checkpoint)
    if compile:
        model.compile_blocks()
    return model


def _given(section: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(section).items() if value is not None and key != "init_from"}
