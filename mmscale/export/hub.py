"""A checkpoint as a Hugging Face Hub folder that loads with stock Transformers calls.

OUT/config.json, generation_config.json     the model's configuration, `auto_map` to the code beside it
    model.safetensors                       the weights, in numbered parts above 5 GB
    *_mmscale.py and what they import       the code of `mmscale/model`
    processor_config.json, tokenizer*.json  pictures to pixels, texts to token ids
    tokenizer.model                         the SentencePiece model itself
    README.md                               the model card
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mmscale.checkpoint import MANIFEST, Checkpoint, find_checkpoint
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.export.card import CardFacts, model_card
from mmscale.export.folder import DTYPES, SHARD_BYTES, Entry, whole_folder, write_weights
from mmscale.export.tokenizer import fast_tokenizer
from mmscale.export.verify import verify_export
from mmscale.model import modeling_mmscale
from mmscale.model.configuration_mmscale import MMScaleConfig
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.processing_mmscale import MMScaleImageProcessor, MMScaleProcessor
from mmscale.pretrained import EXPORTED_TOKENIZER, checkpoint_model_config, run_config
from mmscale.weights import ModelWeights

CODE = Path(modeling_mmscale.__file__).parent
AUTO_MAP = {
    "AutoConfig": "configuration_mmscale.MMScaleConfig",
    "AutoModel": "modeling_mmscale.MMScaleModel",
    "AutoProcessor": "processing_mmscale.MMScaleProcessor",
    "AutoImageProcessor": "processing_mmscale.MMScaleImageProcessor",
}


def export_hub(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str = "fp32",
    ema: bool = False,
    tokenizer: str | Path | None = None,
    scores: str | Path | None = None,
    name: str | None = None,
    license: str | None = None,
    data: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    reuse: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes `out` whole or not at all, after a process without mmscale has loaded it and found the same outputs.

    Args:
        checkpoint: a run folder (its newest whole checkpoint) or a checkpoint folder.
        out: a folder that is empty or not there.
        dtype: of the weights, `fp32`, `bf16` or `fp16`.
        ema: the averaged weights of a run that kept them.
        tokenizer: a SentencePiece model instead of the checkpoint's own.
        scores: a JSON file written by `mmscale eval`, for the card.
        name: the model's name on the card; the folder's unless given.
        license: as the Hub spells it; `data`: what it was trained on. Both for the card.
        shard_bytes: the most bytes in one weights file.
        reuse: leave `out` as it is when it already holds an export of the very same weights.
        say: takes one line for people after each part of the work.

    Raises:
        UserError: nothing to export, `out` is not empty, another vocabulary, a full disk, or outputs that differ.
    """
    out = Path(out)
    source, pieces, pieces_bytes = _open_before_it_goes(Path(checkpoint), tokenizer)
    if ema and not source.names("ema"):
        raise UserError(f"{source.path}: holds no averaged weights; leave out the option for them")
    config = checkpoint_model_config(source, pieces)
    known_scores = _read_scores(scores)
    entries = _entries(source, ema)
    if reuse and _holds(out, entries, DTYPES[dtype]):
        say(f"{out} holds these weights already: reused")
        return out
    with whole_folder(out) as folder:
        total = write_weights(folder, entries, DTYPES[dtype], shard_bytes)
        say(f"weights of {source.path}: {total / 1e6:,.1f} MB in {dtype}")
        write_all_but_weights(folder, config, DTYPES[dtype], pieces, pieces_bytes)
        facts = CardFacts(
            name=name or out.name,
            num_parameters=sum(entry.num_elements for entry in entries.values()),
            dtype=dtype,
            samples=source.samples,
            step=source.step,
            license=license,
            data=data,
            **known_scores,
        )
        (folder / "README.md").write_text(model_card(config, run_config(source), facts), encoding="utf-8")

        model = MMScaleModel(config)
        model.load_state_dict(ModelWeights(source, ema).load())
        differences = verify_export(folder, model.to(DTYPES[dtype]).eval(), pieces)
        largest = ", ".join(f"{key} {value:.1g}" for key, value in differences.items())
        say(f"loaded in a process without mmscale; largest differences: {largest}")
    return out


def write_all_but_weights(
    folder: Path, config: MMScaleConfig, dtype: torch.dtype, pieces: Tokenizer, pieces_bytes: bytes
) -> None:
    """Everything that a stock call needs to load the folder: configuration, tokenizer, processor, code."""
    _write_config(folder, config, dtype)
    (folder / EXPORTED_TOKENIZER).write_bytes(pieces_bytes)
    write_processor(folder, config, fast_tokenizer(pieces, pieces_bytes, config.text_config.context_length))
    for file in code_files():
        shutil.copyfile(file, folder / file.name)


def code_files() -> list[Path]:
    """The files of `mmscale/model` that travel: the three entry points and what they import from one another."""
    waiting, found = ["configuration_mmscale", "modeling_mmscale", "processing_mmscale"], {}
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = CODE / f"{module}.py"
            waiting += re.findall(r"^\s*from \.(\w+) import", found[module].read_text(encoding="utf-8"), re.MULTILINE)
    return [found[module] for module in sorted(found)]


def _open_before_it_goes(path: Path, tokenizer: str | Path | None) -> tuple[Checkpoint, Tokenizer, bytes]:
    """The checkpoint with its weights open and its tokenizer read, so that a run that removes it takes nothing away."""
    while True:
        folder = find_checkpoint(path)
        try:
            source = Checkpoint.open_verified(folder)
            for kind, tensors in source.manifest["tensors"].items():
                for name, entry in tensors.items():
                    for _, start, stop in entry["fragments"]:
                        source.read(name, kind, start, min(start + 1, stop))  # a file once read from stays open
            pieces = Tokenizer.load(tokenizer or source.tokenizer_path)
            return source, pieces, Path(pieces.path).read_bytes()
        except (FileNotFoundError, UserError):
            if (folder / MANIFEST).exists():
                raise
            if folder == path:
                raise UserError(f"{path}: was removed while it was read") from None


def _entries(source: Checkpoint, ema: bool) -> dict[str, Entry]:
    """Every tensor of the model by name, not yet read."""
    weights = ModelWeights(source, ema)
    return {name: Entry(weights.shape(name), partial(weights.read, name)) for name in weights}


def _holds(out: Path, tensors: dict[str, Entry], dtype: torch.dtype) -> bool:
    """Whether a folder is an export of exactly these tensors."""
    files = sorted(out.glob("*.safetensors"))
    if not files or not (out / "README.md").exists():
        return False
    names: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dictionary
                names.add(name)
                if name not in tensors or not torch.equal(file.get_tensor(name), tensors[name].read().to(dtype)):
                    return False
    return names == tensors.keys()


def _write_config(folder: Path, config: MMScaleConfig, dtype: torch.dtype) -> None:
    config.architectures = [MMScaleModel.__name__]
    config.auto_map = AUTO_MAP
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


def write_processor(folder: Path, config: MMScaleConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes what `AutoProcessor` and `AutoTokenizer` load: pictures to pixels, texts to token ids."""
    image_processor = MMScaleImageProcessor(config.vision_config.image_size, config.image_mean, config.image_std)
    image_processor.auto_map = {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}
    processor = MMScaleProcessor(image_processor, tokenizer)
    processor.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # again: the processor leaves its own class map in the tokenizer's file


def _read_scores(path: str | Path | None) -> dict:
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return {"scores": found["scores"], "scored_on": found["data"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the scores that `mmscale eval --output` writes: {error!r}") from None
