"""Proof that an exported folder gives the trained model's outputs: a process that cannot see mmscale loads it."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mmscale.data import images
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.encoding import pad_tokens
from mmscale.export import stock_check
from mmscale.model.modeling_mmscale import MMScaleModel

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
PIXEL_TOLERANCE = 1.001 / 255
PICTURE_SIZES = (
    (64, 64),
    (97, 61),
    (40, 133),
    (300, 224),
    (224, 301),
)  # [width, height]: small, odd, both orientations

# What tokenizers get wrong: marks spelled out, spacing, scripts, joined emoji, things nobody sees.
TEXTS = (
    "a small red circle above two blue squares",
    "",
    "  two   spaces  and a tail  ",
    "</s> closes nothing, <s> opens nothing, <pad> pads nothing, <0x41> is not A, <unk>",
    "une forêt près de l'été",
    "Быстрая лиса",
    "敏捷的棕色狐狸",
    "素早い茶色の狐。",
    "빠른 갈색 여우",
    "الثعلب البني السريع",
    "तेज़ भूरी लोमड़ी",
    "family 👩‍👩‍👧‍👦 flag 🇩🇪 zero\u200bwidth \ufeff and \ufffd",
    "tabs\tand\nlines ▁▁ and marks ▁",
    "a long caption " * 200,
)


def verify_export(folder: Path, model: MMScaleModel, tokenizer: Tokenizer) -> dict[str, float]:
    """Loads the folder with stock Transformers calls in a clean process and compares it with the trained model.

    Args:
        folder: as written by the exporter.
        model: the trained model in the exported dtype, on the CPU, in evaluation mode.

    Returns:
        The largest difference of `pixels` (of 0..1), `image_embeds`, `text_embeds`, `logits` and each task head.

    Raises:
        UserError: the two do not agree, or the folder does not load.
    """
    with tempfile.TemporaryDirectory(prefix="mmscale-verify-") as scratch:
        _write_reference(Path(scratch), model, tokenizer)
        found = _run_stock(folder, Path(scratch))
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    compared = ["pixels", "image_embeds", "text_embeds", "logits", *(f"head_{name}" for name in model.config.heads)]
    differences = {name: found[name] for name in compared if name in found}
    limits = {"pixels": PIXEL_TOLERANCE}
    wrong = [
        f"{name} differ by {found:.2g}" for name, found in differences.items() if found > limits.get(name, tolerance)
    ]
    wrong += [f"other tokens for {text[:40]!r}" for text in found["texts_with_other_tokens"]]
    wrong += ["the processor's tokens differ"] if not found["processor_tokens_equal"] else []
    wrong += ["generated captions differ"] if not found.get("captions_equal", True) else []
    wrong += [f"it imports {name}" for name in found["forbidden_imports"]]
    if wrong:
        raise UserError(f"the export does not reproduce the trained model: {'; '.join(wrong)}")
    return differences


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every Python file of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}


@torch.no_grad()
def _write_reference(scratch: Path, model: MMScaleModel, tokenizer: Tokenizer) -> None:
    """Pictures and texts, and what the trained model makes of them by the project's own way of data."""
    size, context_length = model.config.vision_config.image_size, model.config.text_config.context_length
    pixels = []
    for number, (width, height) in enumerate(PICTURE_SIZES):
        path = scratch / f"picture_{number}.{'jpg' if number % 2 else 'png'}"
        Image.fromarray(_picture(width, height, number)).save(path)
        pixels.append(images.center_view(images.decode(path.read_bytes(), 1 << 26), size))
    pixel_values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    token_ids = [tokenizer.encode(text, context_length) for text in TEXTS]
    input_ids, lengths = pad_tokens(token_ids, tokenizer.pad_id, context_length)
    # As many pictures as texts, so that each text is decoded against one.
    pixel_values = pixel_values[torch.arange(len(TEXTS)) % len(pixels)].contiguous()
    output = model(input_ids=input_ids, pixel_values=pixel_values, lengths=lengths)
    tensors = {
        "pixel_values": pixel_values,
        "input_ids": input_ids,
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
    }
    if output.logits is not None:
        tensors["logits"] = output.logits
        tensors["generated"] = model.generate(pixel_values=pixel_values[:3], do_sample=False, num_beams=1)
    given = {"texts": TEXTS, "token_ids": token_ids, "threads": torch.get_num_threads()}
    tensors |= {f"head_{name}": scores for name, scores in (output.head_logits or {}).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch / "reference.safetensors")
    (scratch / "reference.json").write_text(json.dumps(given), encoding="utf-8")


def _picture(width: int, height: int, seed: int) -> np.ndarray:
    """Smooth colours, a hard edge and noise: what resizing treats differently."""
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([255 * columns / width, 255 * rows / height, 127 + 127 * np.sin(columns / 7 + rows / 5)], axis=-1)
    smooth[height // 3 : height // 2, width // 3 :] = (250, 20, 40)
    noise = np.random.default_rng(seed).normal(0, 20, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def _run_stock(folder: Path, scratch: Path) -> dict:
    own = file_hashes(Path(sys.modules[MMScaleModel.__module__].__file__).parent)
    for name, digest in file_hashes(folder).items():
        assert own.get(name) == digest, f"{name} is not the code of mmscale/model"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-I", str(Path(stock_check.__file__).resolve()), str(folder.resolve()), str(scratch)]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the export does not load with stock Transformers calls: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])
