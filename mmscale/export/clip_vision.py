"""The image tower's trunk to and from Transformers' `CLIPVisionModel`, and from its `SiglipVisionModel`.

The trunk is everything below the attentional pooler, and the pooler's norm of its input, which is what those models
call `post_layernorm`.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PretrainedConfig,
    SiglipVisionModel,
)

from mmscale.checkpoint import Checkpoint
from mmscale.config import ModelConfig
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.export.folder import whole_folder
from mmscale.export.table import Row, linear, resize_positions, row, to_ours, to_theirs
from mmscale.model.configuration_mmscale import MMScaleConfig, MMScaleVisionConfig
from mmscale.model.vision_tower import VisionTower
from mmscale.pretrained import checkpoint_model_config
from mmscale.weights import ModelWeights

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def table(vision: MMScaleVisionConfig) -> Iterator[Row]:
    """Every tensor of the trunk, by its name in `VisionTower` and in theirs."""
    yield row("patch_embedding.weight", "embeddings.patch_embedding.weight", "patches")
    if vision.patch_bias:
        yield row("patch_embedding.bias", "embeddings.patch_embedding.bias")
    if vision.class_token:
        yield row("class_token", "embeddings.class_embedding")
    yield row("positions", "embeddings.position_embedding.weight")
    if vision.pre_norm:
        yield from linear("norm_pre", "pre_layrnorm")
    for layer in range(vision.layers):
        ours, theirs = f"blocks.{layer}", f"encoder.layers.{layer}"
        yield from linear(f"{ours}.norm_1", f"{theirs}.layer_norm1")
        for part in ("weight", "bias"):
            split = tuple(f"{theirs}.self_attn.{name}_proj.{part}" for name in "qkv")
            yield Row((f"{ours}.attention.qkv.{part}",), split, "stacked", ((3,), (1, 1, 1)))
        yield from linear(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
        yield from linear(f"{ours}.norm_2", f"{theirs}.layer_norm2")
        yield from linear(f"{ours}.mlp.up", f"{theirs}.mlp.fc1")
        yield from linear(f"{ours}.mlp.down", f"{theirs}.mlp.fc2")
    yield from linear("pooler.norm_context", "post_layernorm")


def with_trunk_settings(model: ModelConfig) -> ModelConfig:
    """A copy whose unset sizes and settings of the image tower are those of `vision.init_from`, if that is set.

    Raises:
        UserError: no such folder, or a trunk of another kind.
    """
    if model.vision.init_from is None:
        return model
    settings = trunk_settings(model.vision.init_from)
    unset = {key: value for key, value in settings.items() if getattr(model.vision, key) is None}
    return model.model_copy(update={"vision": model.vision.model_copy(update=unset)})


def trunk_settings(folder: str | Path) -> dict[str, Any]:
    """What `config.json` of a Transformers folder says about its image tower, in the words of `model.vision`."""
    config = _vision_config(folder)
    clip = config.model_type == "clip_vision_model"
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"{folder}: its activation `{config.hidden_act}` is not one of {', '.join(ACTIVATIONS)}")
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "class_token": clip,
        "pre_norm": clip,
        "patch_bias": not clip,
        "activation": ACTIVATIONS[config.hidden_act],
        "layer_norm_eps": config.layer_norm_eps,
    }


def read_trunk(folder: str | Path, config: MMScaleConfig) -> dict[str, Tensor]:
    """The trunk's weights under our names; positions are interpolated when the resolution differs.

    Raises:
        UserError: the trunk's sizes are not those of the configuration.
    """
    kind = CLIPVisionModel if _vision_config(folder).model_type == "clip_vision_model" else SiglipVisionModel
    theirs = _without_prefix(kind.from_pretrained(folder, local_files_only=True).state_dict())
    vision = config.vision_config
    positions = "embeddings.position_embedding.weight"
    theirs[positions] = resize_positions(
        theirs[positions], vision.image_size // vision.patch_size, int(vision.class_token)
    )
    try:
        found = to_ours(table(vision), theirs)
    except KeyError as error:
        raise UserError(f"{folder}: has no tensor {error}; model.vision asks for another trunk") from None
    with torch.device("meta"):
        wanted = VisionTower(config).state_dict()
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{folder}: `{name}` is {list(tensor.shape)}, but model.vision asks for {list(wanted[name].shape)}"
            )
    return {f"vision.{name}": tensor for name, tensor in found.items()}


def clip_vision_config(config: MMScaleConfig) -> CLIPVisionConfig:
    """The configuration of the trunk as a `CLIPVisionModel`.

    Raises:
        UserError: a trunk that `CLIPVisionModel` cannot hold.
    """
    vision = config.vision_config
    for wrong, why in (
        (not vision.class_token, "it has no class token"),
        (not vision.pre_norm, "it has no norm before the blocks"),
        (vision.patch_bias, "its patch embedding has a bias"),
        (vision.prompt_tokens, "it has learned prompt tokens"),
    ):
        if wrong:
            raise UserError(f"CLIPVisionModel cannot hold this image tower: {why}")
    return CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=int(vision.width * vision.mlp_ratio),
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act={ours: theirs for theirs, ours in ACTIVATIONS.items()}[vision.activation],
        layer_norm_eps=vision.layer_norm_eps,
    )


def to_clip_vision(tensors: dict[str, Tensor], config: MMScaleConfig) -> CLIPVisionModel:
    """The trunk, given our tensors by name, as a `CLIPVisionModel` in evaluation mode."""
    model = CLIPVisionModel(clip_vision_config(config)).eval()
    ours = {name.removeprefix("vision."): tensor for name, tensor in tensors.items() if name.startswith("vision.")}
    theirs = to_theirs(table(config.vision_config), ours)
    names = {_plain(name): name for name in model.state_dict()}
    model.load_state_dict({names[name]: tensor for name, tensor in theirs.items()})
    return model


def export_clip_vision(
    checkpoint: str | Path, out: str | Path, *, ema: bool = False, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Writes the trunk as a folder that stock `CLIPVisionModel.from_pretrained` loads, and compares the two's outputs.

    Raises:
        UserError: nothing to export, `out` is not empty, or a trunk that `CLIPVisionModel` cannot hold.
    """
    source = Checkpoint.open(checkpoint)
    config = checkpoint_model_config(source, Tokenizer.load(source.tokenizer_path))
    tensors = ModelWeights(source, ema).load()
    tower = VisionTower(config).eval()
    tower.load_state_dict({n.removeprefix("vision."): t for n, t in tensors.items() if n.startswith("vision.")})
    size = config.vision_config.image_size
    with whole_folder(out) as folder:
        to_clip_vision(tensors, config).save_pretrained(folder)
        processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}}
        processor |= {"crop_size": {"height": size, "width": size}, "resample": 3, "do_convert_rgb": True}
        processor |= {"image_mean": config.image_mean, "image_std": config.image_std}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
        pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        stock = CLIPVisionModel.from_pretrained(folder, local_files_only=True).eval()
        with torch.no_grad():
            expected = tower.trunk(pictures)
            difference = (stock(pictures).last_hidden_state - expected).abs().max() / expected.abs().max()
        assert difference <= 1e-4, f"the written trunk differs by {difference:.1g}"
    say(f"the image trunk of {source.path} as a CLIPVisionModel; largest relative difference {difference:.1g}")
    return Path(out)


def _vision_config(folder: str | Path) -> PretrainedConfig:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: not a Transformers folder (it has no config.json)")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())[:200]}") from None
    config = getattr(config, "vision_config", config)
    if config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise UserError(f"{folder}: holds a `{config.model_type}`; an image tower starts from a CLIP or SigLIP trunk")
    return config


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_plain(name): tensor for name, tensor in state.items()}


def _plain(name: str) -> str:
    """Some versions of Transformers keep the tower in an attribute, others are the tower."""
    return name.removeprefix("vision_model.")
