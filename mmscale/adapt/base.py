"""From a pretrained model to the one that is tuned: its settings, its weights, its new parts, and what is trained."""

import torch

from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.lora import add_adapters
from mmscale.adapt.vocabulary import change_vocabulary
from mmscale.config import DecoderSizes, HeadConfig, TextSizes, VisionSizes
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.model.configuration_mmscale import MMScaleConfig
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.presets import build_model, build_model_config
from mmscale.pretrained import EXPORTED_TOKENIZER, Pretrained, load_pretrained
from mmscale.train.optimizer import freeze

SIZES = {
    part: [key for key in section.model_fields if key != "init_from"]
    for part, section in (("vision", VisionSizes), ("text", TextSizes), ("decoder", DecoderSizes))
}


def load_base(config: AdaptConfig) -> Pretrained:
    """The pretrained model that `model.init_from` names, on the CPU.

    With a `tokenizer.path` or a `model.text.context_length` of its own, the model is changed to them first. Raises
    UserError.
    """
    if config.model.init_from is None:
        raise UserError("model.init_from: not set; it names the run, checkpoint or exported folder to adapt")
    base = load_pretrained(config.model.init_from, device="cpu")
    tokenizer = Tokenizer.load(config.tokenizer.path) if config.tokenizer.path else base.tokenizer
    context_length = config.model.text.context_length or base.context_length
    if tokenizer.fingerprint != base.tokenizer.fingerprint or context_length > base.context_length:
        base.model = change_vocabulary(base.model, base.tokenizer, tokenizer, context_length)
        base.tokenizer = tokenizer
    return base


def complete(config: AdaptConfig, base: Pretrained, heads: dict[str, HeadConfig] | None = None) -> AdaptConfig:
    """The configuration with the base's sizes, tokenizer and kind of loss written out, so that a run stands alone.

    Raises UserError for a size that is set to something else than the base's.
    """
    sizes = base.model.config
    model = config.model.model_dump(mode="json")
    for part, keys in SIZES.items():
        own = getattr(sizes, f"{part}_config")
        for key in keys:
            wanted, found = model[part].get(key), getattr(own, key)
            if wanted is not None and wanted != found:
                raise UserError(
                    f"model.{part}.{key}: {wanted}, but the base ({config.model.init_from}) has {found}; leave it out"
                )
            model[part][key] = found
    model |= {"embed_dim": sizes.embed_dim, "legacy_cls_mask": sizes.legacy_cls_mask}
    model["patch_tokens"] |= sizes.vision_config.patch_tokens
    model["heads"] = {name: head.model_dump(mode="json") for name, head in (heads or {}).items()}
    exported = base.path / EXPORTED_TOKENIZER
    raw = config.model_dump(mode="json")
    raw["model"] = model
    raw["tokenizer"]["path"] = config.tokenizer.path or str(exported if exported.exists() else base.tokenizer.path)
    raw["objective"]["contrastive"] = "clip" if sizes.logit_bias_init is None else "siglip"
    return AdaptConfig.model_validate(raw)


def adapted_model(config: AdaptConfig, base: Pretrained, tokenizer: Tokenizer) -> MMScaleModel:
    """The base's weights in a model with the parts that `config` (of `complete`) adds; the new parts start at random.

    Only what `adapt.trainable`, `adapt.top_blocks` and `model.lora` choose requires a gradient.
    """
    torch.manual_seed(config.run.seed)
    model = build_model(model_config(config, tokenizer), config.model.checkpoint)
    missing, unexpected = model.load_state_dict(base.model.state_dict(), strict=False)
    assert not unexpected, unexpected
    adapters = add_adapters(model, config.model.lora) if config.model.lora is not None else []
    choose_trainable(model, config, new=[*missing, *adapters])
    if config.model.compile:
        model.compile_blocks()
    return model


def model_config(config: AdaptConfig, tokenizer: Tokenizer) -> MMScaleConfig:
    return build_model_config(
        config.model,
        tokenizer.vocab_size,
        tokenizer.pad_id,
        tokenizer.start_id,
        tokenizer.end_id,
        contrastive=config.objective.contrastive,
    )


def choose_trainable(model: MMScaleModel, config: AdaptConfig, new: list[str]) -> None:
    """Takes everything out of training but the parts that are chosen and the `new` parameters.

    Raises UserError for a part that the model does not have.
    """
    chosen, top = config.adapt.trainable, config.adapt.top_blocks
    if chosen is None:
        chosen = [] if config.model.lora is not None or top is not None else ["all"]
    known = dict(model.named_modules())
    for part in chosen:
        if part not in ("all", "new") and part not in known:
            names = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"adapt.trainable: the model has no part `{part}`; there are {names}, and what is in them")
    prefixes = [f"{part}." for part in chosen if part not in ("all", "new")]
    if top is not None:
        prefixes += [
            f"{tower}.blocks.{number}."
            for tower in ("vision", "text", "decoder")
            if (blocks := getattr(getattr(model, tower, None), "blocks", None)) is not None
            for number in range(max(0, len(blocks) - top), len(blocks))
        ]
        prefixes += ["vision.pooler.", "vision.norm_pooled.", "vision.projection.", "text.norm_final."]
    new = set(new)
    for name, parameter in model.named_parameters():
        wanted = "all" in chosen or name in new or name.startswith(tuple(prefixes))
        parameter.requires_grad_(wanted)
        if name in new:
            parameter.lr_scale = config.adapt.new_lr_scale  # read where the optimizer's groups are made
    freeze(model, config.train.freeze)
