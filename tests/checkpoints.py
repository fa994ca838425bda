"""A small checkpoint that was never trained: random weights in the real format, with a tokenizer beside them."""

from pathlib import Path

import torch

from mmscale.checkpoint import Fragment, commit, folder_name, write_fragments
from mmscale.config import Config
from mmscale.data.tokenizer import Tokenizer, train_tokenizer
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.presets import build_model_config

WORDS = [
    "a",
    "two",
    "three",
    "small",
    "large",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "above",
    "below",
    "left",
    "of",
]
SMALL = {
    "preset": "tiny",
    "embed_dim": 32,
    "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "pooler_queries": 5},
    "text": {"context_length": 24, "width": 32, "layers": 2, "heads": 2},
    "decoder": {"layers": 2, "heads": 2},
}


def write_checkpoint(run: Path, step: int = 3, ema: bool = False, **sections) -> tuple[MMScaleModel, Tokenizer, Path]:
    """Writes `run/checkpoints/step_...` as two ranks would; returns the model, its tokenizer and the folder.

    Args:
        sections: of the run's configuration, over small defaults.
    """
    run.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(WORDS[i % 7 :: 1 + i % 5]) for i in range(200)]
    tokenizer = train_tokenizer(lines, run / "tokenizer.model", 300)
    defaults = {"run": {"dir": str(run)}, "train": {"samples": 64, "global_batch": 8}, "model": SMALL}
    config = Config.model_validate(defaults | {"tokenizer": {"path": str(run / "tokenizer.model")}} | sections)
    torch.manual_seed(step)
    sizes = build_model_config(config.model, tokenizer.vocab_size, contrastive=config.objective.contrastive)
    model = MMScaleModel(sizes).eval()
    fragments = [[], []]
    for name, tensor in model.state_dict().items():
        flat, half = tensor.detach().flatten(), tensor.numel() // 2
        kinds = {"param": flat, "ema": flat * 0.5} if ema else {"param": flat}
        for kind, data in kinds.items():
            fragments[0].append(Fragment(kind, name, tuple(tensor.shape), 0, half, data[:half]))
            fragments[1].append(Fragment(kind, name, tuple(tensor.shape), half, tensor.numel(), data[half:]))
    folder = run / "checkpoints" / folder_name(step)
    for rank in (0, 1):
        write_fragments(folder, rank, fragments[rank], "nonce")
    facts = {"step": step, "samples": step * 8, "config": config.model_dump(mode="json")}
    assert commit(folder, 2, "nonce", facts, tokenizer=run / "tokenizer.model")
    return model, tokenizer, folder
