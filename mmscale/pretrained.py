"""A trained model with its tokenizer, from a run folder, a checkpoint or an exported folder.

Only our own classes are used: nothing that a folder brings along is executed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmscale.checkpoint import Checkpoint
from mmscale.config import Config, DataConfig, Section, validate
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.model.configuration_mmscale import MMScaleConfig
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.presets import build_model_config
from mmscale.weights import ModelWeights

EXPORTED_TOKENIZER = "tokenizer.model"  # the SentencePiece file, beside the fast tokenizer made from it


@dataclass
class Pretrained:
    """A model ready for use.

    Attributes:
        model: in evaluation mode, on the device asked for.
        path: the checkpoint or exported folder that it came from.
        run: the configuration it was trained with; None for an exported folder.
        step, samples: how far its training had come; None for an exported folder.
    """

    model: MMScaleModel
    tokenizer: Tokenizer
    path: Path
    run: Config | None = None
    step: int | None = None
    samples: int | None = None

    @property
    def data(self) -> DataConfig:
        """How its run read shards; the defaults for an exported folder."""
        return self.run.data if self.run else DataConfig()

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    @property
    def context_length(self) -> int:
        return self.model.config.text_config.context_length


def load_pretrained(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: str | Path | None = None,
    ema: bool = False,
) -> Pretrained:
    """Loads a model for inference.

    Args:
        path: a run folder (its newest whole checkpoint), a checkpoint folder, or a folder made by `mmscale export`.
        dtype: of the weights; as they are stored when unset.
        device: a GPU where there is one when unset.
        tokenizer: a SentencePiece model instead of the one that lies beside the weights.
        ema: the averaged weights of a run that kept them.

    Raises:
        UserError: nothing to load there, or a tokenizer of another vocabulary.
    """
    path = Path(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    load = _load_exported if (path / "config.json").is_file() else _load_checkpoint
    pretrained = load(path, Path(tokenizer) if tokenizer else None, ema)
    pretrained.model.to(device=device, dtype=dtype).eval()
    return pretrained


def checkpoint_model_config(checkpoint: Checkpoint, tokenizer: Tokenizer) -> MMScaleConfig:
    """The model's configuration, of a checkpoint whose vocabulary is the tokenizer's.

    Raises:
        UserError: the vocabulary is another.
    """
    run = run_config(checkpoint)
    check_vocabulary(tokenizer, checkpoint.shape("text.tokens.weight")[0], checkpoint.path)
    return build_model_config(
        run.model,
        tokenizer.vocab_size,
        tokenizer.pad_id,
        tokenizer.start_id,
        tokenizer.end_id,
        contrastive=run.objective.contrastive,
    )


def run_config(checkpoint: Checkpoint) -> Config:
    """The configuration of the run that wrote a checkpoint; settings that only another version knew are left out."""
    return validate(_known(checkpoint.config, Config), Config, f"{checkpoint.path}: the run's configuration")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: Path) -> None:
    """Raises UserError when the tokenizer has another number of pieces than the model has rows."""
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{tokenizer.path}: this tokenizer has {tokenizer.vocab_size} pieces, but the model in {where} was trained "
            f"with {vocab_size}; use the tokenizer of its run"
        )


def _known(raw: dict[str, Any], schema: type[Section]) -> dict[str, Any]:
    known = {key: value for key, value in raw.items() if key in schema.model_fields}
    for key, value in known.items():
        kind = schema.model_fields[key].annotation
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
            known[key] = _known(value, kind)
    return known


def _load_checkpoint(path: Path, tokenizer_path: Path | None, ema: bool) -> Pretrained:
    checkpoint = Checkpoint.open(path)
    tokenizer = Tokenizer.load(tokenizer_path or checkpoint.tokenizer_path)
    model = MMScaleModel(checkpoint_model_config(checkpoint, tokenizer))
    if ema and not checkpoint.names("ema"):
        raise UserError(f"{checkpoint.path}: holds no averaged weights; leave out the option for them")
    _fill(model, ModelWeights(checkpoint, ema).load(), checkpoint.path)
    return Pretrained(model, tokenizer, checkpoint.path, run_config(checkpoint), checkpoint.step, checkpoint.samples)


def _load_exported(path: Path, tokenizer_path: Path | None, ema: bool) -> Pretrained:
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}/config.json: cannot be read: {error}") from None
    if kind != MMScaleConfig.model_type:
        raise UserError(f"{path}: holds a model of type `{kind}`, not one exported by mmscale")
    if ema:
        raise UserError(f"{path}: an exported folder holds one set of weights; averaged ones are chosen when exporting")
    tokenizer = Tokenizer.load(tokenizer_path or path / EXPORTED_TOKENIZER)
    model = MMScaleModel(MMScaleConfig.from_pretrained(path, local_files_only=True))
    tensors: dict[str, torch.Tensor] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            tensors |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the weights cannot be read: {error}") from None
    check_vocabulary(tokenizer, model.config.vocab_size, path)
    _fill(model.to(model.config.dtype), tensors, path)
    return Pretrained(model, tokenizer, path)


def _fill(model: MMScaleModel, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Loads the weights. Raises UserError naming the first that is missing, not known, or of another shape."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        shapes = [list(shapes[name]) if name in shapes else "nothing" for shapes in (found, expected)]
        raise UserError(
            f"{path}: holds {shapes[0]} for `{name}`, this version's model {shapes[1]}; "
            "load it with the version of mmscale that wrote it"
        )
    model.load_state_dict(tensors)
