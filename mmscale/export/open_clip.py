"""Weights to and from open_clip's CoCa, by a table.

Both models compute the same function. What differs: open_clip keeps projections transposed and the patch embedding as a
convolution, joins queries, keys and values where we split them (and the other way round in the pooler), and its logit
scale has no dimension. open_clip's text tower masks CLS off by one unless `model.text.correct_cls_mask` is set there,
which no configuration file of open_clip 3.3 can say: `model.legacy_cls_mask` here is the setting that agrees with it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmscale.checkpoint import Checkpoint
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.export.folder import whole_folder
from mmscale.export.table import Row, linear, resize_positions, row, to_ours, to_theirs
from mmscale.model.configuration_mmscale import MMScaleConfig
from mmscale.pretrained import checkpoint_model_config
from mmscale.weights import ModelWeights


def table(config: MMScaleConfig) -> Iterator[Row]:
    """Every tensor of the model, once."""
    vision = config.vision_config
    yield row("vision.patch_embedding.weight", "visual.conv1.weight", "patches")
    yield row("vision.class_token", "visual.class_embedding")
    yield row("vision.positions", "visual.positional_embedding")
    if vision.pre_norm:
        yield from linear("vision.norm_pre", "visual.ln_pre")
    for layer in range(vision.layers):
        yield from _block(f"vision.blocks.{layer}", f"visual.transformer.resblocks.{layer}")
    yield from _pooler(config)
    yield from linear("vision.norm_pooled", "visual.ln_post")
    yield row("vision.projection.weight", "visual.proj", "transposed")

    yield row("text.tokens.weight", "text.token_embedding.weight")
    yield row("text.cls_token", "text.cls_emb")
    yield row("text.positions", "text.positional_embedding")
    for layer in range(config.text_config.layers):
        yield from _block(f"text.blocks.{layer}", f"text.transformer.resblocks.{layer}")
    yield from linear("text.norm_final", "text.ln_final")
    yield row("text.projection.weight", "text.text_projection", "transposed")

    for layer in range(config.decoder_config.layers):
        yield from _block(f"decoder.blocks.{layer}", f"text_decoder.resblocks.{layer}")
        yield from _cross_block(f"decoder.cross_blocks.{layer}", f"text_decoder.cross_attn.{layer}")
    yield from linear("decoder.norm_final", "text_decoder.ln_final")
    yield row("decoder.head.weight", "text_decoder.text_projection", "transposed")

    yield row("logit_scale.log_scale", "logit_scale", "scalar")
    if config.logit_bias_init is not None:
        yield row("logit_scale.bias", "logit_bias", "scalar")


def _block(ours: str, theirs: str) -> Iterator[Row]:
    yield from linear(f"{ours}.norm_1", f"{theirs}.ln_1")
    for part in ("weight", "bias"):
        yield row(f"{ours}.attention.qkv.{part}", f"{theirs}.attn.in_proj_{part}")
    yield from linear(f"{ours}.attention.out", f"{theirs}.attn.out_proj")
    yield from _feed_forward(ours, theirs)


def _cross_block(ours: str, theirs: str) -> Iterator[Row]:
    yield from linear(f"{ours}.norm_1", f"{theirs}.ln_1")
    for part in ("weight", "bias"):
        yield row(f"{ours}.attention.key_value.norm_{part}", f"{theirs}.ln_1_kv.{part}")
        split = (f"{ours}.attention.query.{part}", f"{ours}.attention.key_value.{part}")
        yield Row(split, (f"{theirs}.attn.in_proj_{part}",), "stacked", ((1, 2), (3,)))
    yield from linear(f"{ours}.attention.out", f"{theirs}.attn.out_proj")
    yield from _feed_forward(ours, theirs)


def _feed_forward(ours: str, theirs: str) -> Iterator[Row]:
    yield from linear(f"{ours}.norm_2", f"{theirs}.ln_2")
    yield from linear(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc")
    yield from linear(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj")


def _pooler(config: MMScaleConfig) -> Iterator[Row]:
    ours, theirs = "vision.pooler", "visual.attn_pool"
    yield row(f"{ours}.queries", f"{theirs}.query")
    yield from linear(f"{ours}.norm_queries", f"{theirs}.ln_q")
    yield from linear(f"{ours}.norm_context", f"{theirs}.ln_k")
    biases = (f"{ours}.query.bias", f"{ours}.key_value.bias")
    yield Row(biases, (f"{theirs}.attn.in_proj_bias",), "stacked", ((1, 2), (3,)))
    query, key_value = f"{ours}.query.weight", f"{ours}.key_value.weight"
    if config.embed_dim == config.vision_config.width:
        yield Row((query, key_value), (f"{theirs}.attn.in_proj_weight",), "stacked", ((1, 2), (3,)))
    else:  # torch's attention splits its weights when keys are of another width than queries
        yield row(query, f"{theirs}.attn.q_proj_weight")
        split = (f"{theirs}.attn.k_proj_weight", f"{theirs}.attn.v_proj_weight")
        yield Row((key_value,), split, "stacked", ((2,), (1, 1)))
    yield from linear(f"{ours}.out", f"{theirs}.attn.out_proj")


def to_open_clip(tensors: Mapping[str, Tensor], config: MMScaleConfig) -> dict[str, Tensor]:
    """Our tensors by name as open_clip's state dict."""
    return to_theirs(table(config), tensors)


def from_open_clip(tensors: Mapping[str, Tensor], config: MMScaleConfig) -> dict[str, Tensor]:
    """open_clip's state dict as our tensors by name; raises KeyError when a tensor is missing."""
    return to_ours(table(config), tensors)


def open_clip_config(config: MMScaleConfig) -> dict:
    """The model as one of open_clip's JSON configurations.

    Raises:
        UserError: a size or a setting that open_clip's CoCa does not have.
    """
    vision, text, decoder = config.vision_config, config.text_config, config.decoder_config
    activations = {vision.activation, text.activation, decoder.activation}
    for wrong, why in (
        (not decoder.layers, "it has no decoder (decoder.layers is 0)"),
        (config.embed_dim != text.width, f"embed_dim ({config.embed_dim}) is not the text's width ({text.width})"),
        (decoder.layers and decoder.mlp_ratio != 4, f"decoder.mlp_ratio is {decoder.mlp_ratio}, not 4"),
        (not vision.class_token, "its image tower has no class token"),
        (vision.patch_bias, "its patch embedding has a bias"),
        (len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}, f"its activations are {activations}"),
        (vision.width % vision.heads != 0, "the image tower's heads do not divide its width"),
        (vision.patch_tokens, "its decoder sees the patches (patch_tokens)"),
        (vision.prompt_tokens or decoder.prefix_tokens, "it has learned prompts in its image tower or decoder"),
    ):
        if wrong:
            raise UserError(f"open_clip's CoCa cannot hold this model: {why}")
    shared = {"context_length": text.context_length, "vocab_size": config.vocab_size, "width": text.width}
    settings = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": vision.mlp_ratio,
            "patch_size": vision.patch_size,
            "attentional_pool": True,
            "attn_pooler_queries": vision.pooler_queries,
            "attn_pooler_heads": vision.pooler_heads,
            "no_ln_pre": not vision.pre_norm,
            "norm_kwargs": {"eps": vision.layer_norm_eps},
            "output_tokens": True,
        },
        "text_cfg": shared
        | {
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
            "pad_id": config.pad_token_id,
            "embed_cls": True,
            "output_tokens": True,
        },
        "multimodal_cfg": shared | {"heads": decoder.heads, "layers": decoder.layers},
        "custom_text": True,
    }
    if activations == {"quick_gelu"}:
        settings["quick_gelu"] = True
    if config.logit_bias_init is not None:
        settings["init_logit_bias"] = config.logit_bias_init
    return settings


def export_open_clip(
    checkpoint: str | Path,
    out: str | Path,
    *,
    ema: bool = False,
    tokenizer: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes `out`: `open_clip_model.safetensors` and `open_clip_config.json`, as open_clip's `local-dir:` loads them.

    The weights are converted back and compared with the checkpoint's, bit for bit, before this returns.

    Raises:
        UserError: nothing to export, `out` is not empty, or a model that open_clip's CoCa cannot hold.
    """
    source = Checkpoint.open(checkpoint)
    pieces = Tokenizer.load(tokenizer or source.tokenizer_path)
    config = checkpoint_model_config(source, pieces)
    settings = open_clip_config(config)
    trained = ModelWeights(source, ema).load()
    preprocess = {"mean": config.image_mean, "std": config.image_std, "interpolation": "bicubic"}
    with whole_folder(out) as folder:
        save_file(to_open_clip(trained, config), folder / "open_clip_model.safetensors")
        written = {"model_cfg": settings, "preprocess_cfg": preprocess | {"resize_mode": "shortest"}}
        (folder / "open_clip_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        back = from_open_clip(load_file(folder / "open_clip_model.safetensors"), config)
        assert back.keys() == trained.keys()
        assert all(torch.equal(back[name], trained[name]) for name in back)
    say(f"{len(back)} tensors of {source.path} in open_clip's layout, equal when read back")
    if not config.legacy_cls_mask:
        say("in open_clip, set `model.text.correct_cls_mask = True`: its default mask differs from this model's")
    say("texts have to be tokenized by this model's own SentencePiece model, not by open_clip's tokenizer")
    return Path(out)


def read_open_clip(path: str | Path, config: MMScaleConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of an open_clip CoCa as our tensors, and the names of those that are left out.

    Picture positions are interpolated when the resolution differs. The token table and the vocabulary head are left out
    when the vocabulary has another size: it is another vocabulary.

    Args:
        path: a `.safetensors` file, or a `.pt` / `.bin` that holds a state dict or a training checkpoint of open_clip.

    Raises:
        UserError: not such a file, or sizes that differ from the configuration's.
    """
    theirs = _read_state_dict(Path(path))
    if "visual.positional_embedding" in theirs:
        grid = config.vision_config.image_size // config.vision_config.patch_size
        theirs["visual.positional_embedding"] = resize_positions(theirs["visual.positional_embedding"], grid, prefix=1)
    try:
        ours = from_open_clip(theirs, config)
    except KeyError as error:
        raise UserError(f"{path}: has no tensor {error}; a CoCa of the configured numbers of layers has") from None
    except RuntimeError as error:
        raise UserError(f"{path}: its sizes are not the configured model's: {error}") from None
    left_out = []
    if len(ours["text.tokens.weight"]) != config.vocab_size:
        left_out = ["text.tokens.weight", "decoder.head.weight"]
        ours = {name: tensor for name, tensor in ours.items() if name not in left_out}
    return ours, left_out


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # the two readers raise many kinds, each meaning that this is no such file
        raise UserError(f"{path}: not readable as weights: {' '.join(str(error).split())[:200]}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
