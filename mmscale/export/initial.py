"""Where a new run's weights come from, when not from chance: `model.init_from` and `model.vision.init_from`."""

from mmscale.config import ModelConfig
from mmscale.errors import UserError
from mmscale.export.clip_vision import read_trunk
from mmscale.export.open_clip import read_open_clip
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.pretrained import load_pretrained

OPEN_CLIP = "open_clip:"
# What a model may have beyond the one whose weights it takes over; it starts from chance.
ADDED = "vision.unpooled."


def take_initial_weights(model: MMScaleModel, settings: ModelConfig) -> list[str]:
    """Puts the named weights into a freshly initialised model; a trunk goes over what `model.init_from` gave.

    Args:
        settings: the run's `model` section. `init_from` is a checkpoint, an export folder, or `open_clip:FILE`;
            `vision.init_from` a Transformers folder with a CLIP or SigLIP trunk, whose sizes the model must have
            (`mmscale.export.clip_vision.with_trunk_settings`).

    Returns:
        A line for people about each source.

    Raises:
        UserError: nothing there to start from, or other sizes than the model's.
    """
    notes = []
    if settings.init_from is not None:
        tensors, left_out = _read(settings.init_from, model)
        _check_shapes(settings.init_from, tensors, model)
        model.load_state_dict(tensors, strict=False)
        notes.append(f"model.init_from: {len(tensors)} tensors of {settings.init_from}")
        if added := sorted(name for name in model.state_dict() if name.startswith(ADDED) and name not in tensors):
            notes[-1] += f"; {', '.join(added)} are new (model.patch_tokens)"
        if left_out:
            notes[-1] += f"; {', '.join(left_out)} start afresh, for theirs are of another vocabulary"
    if settings.vision.init_from is not None:
        trunk = read_trunk(settings.vision.init_from, model.config)
        model.load_state_dict(trunk, strict=False)
        notes.append(f"model.vision.init_from: {len(trunk)} tensors of {settings.vision.init_from}")
    return notes


def _read(source: str, model: MMScaleModel) -> tuple[dict, list[str]]:
    if source.startswith(OPEN_CLIP):
        return read_open_clip(source.removeprefix(OPEN_CLIP), model.config)
    return load_pretrained(source, device="cpu").model.state_dict(), []


def _check_shapes(source: str, tensors: dict, model: MMScaleModel) -> None:
    for name, wanted in model.state_dict().items():
        if name in tensors and tensors[name].shape != wanted.shape:
            raise UserError(
                f"model.init_from: {source} holds {list(tensors[name].shape)} for `{name}`, "
                f"this model {list(wanted.shape)}"
            )
        may_be_missing = name in ("text.tokens.weight", "decoder.head.weight") or name.startswith(ADDED)
        if name not in tensors and not may_be_missing:
            raise UserError(f"model.init_from: {source} holds nothing for `{name}`")
