"""Loads an exported folder as a stranger would, and reports how far its outputs are from the trained model's.

Run as a script, in a process of its own: `python -I stock_check.py FOLDER REFERENCE`. It needs what a stranger has
(torch, transformers, pillow) and refuses to see mmscale, so that an export cannot lean on it by accident. FOLDER's own
code is executed here, after `mmscale.export.verify` has compared it with the code it was copied from.

REFERENCE holds `reference.json` (texts), `reference.safetensors` (what the trained model gives), and pictures as PNG.
Prints one line of JSON: the largest differences, and what does not agree at all.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class _NoProject(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "mmscale" or fullname.startswith("mmscale."):
            raise ModuleNotFoundError("mmscale is hidden: an export has to stand alone")
        return None


def main(folder: str, reference: str) -> None:
    sys.meta_path.insert(0, _NoProject())
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    expected = load_file(Path(reference) / "reference.safetensors")
    given = json.loads((Path(reference) / "reference.json").read_text(encoding="utf-8"))
    torch.set_num_threads(given["threads"])
    stock = {"trust_remote_code": True, "local_files_only": True}
    model = AutoModel.from_pretrained(folder, dtype="auto", **stock).eval()
    processor = AutoProcessor.from_pretrained(folder, **stock)
    tokenizer = AutoTokenizer.from_pretrained(folder, **stock)
    found: dict[str, object] = {}

    pictures = [Image.open(path) for path in sorted(Path(reference).glob("*.png"))]
    config = model.config
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].float() * std + mean
    found["pixels"] = _difference(pixels, expected["pixel_values"][: len(pictures)].float() / 255)

    ids = tokenizer(given["texts"], truncation=True)["input_ids"]
    wrong = [text for text, own, right in zip(given["texts"], ids, given["token_ids"], strict=True) if own != right]
    found["texts_with_other_tokens"] = wrong[:3]
    padded = processor(text=given["texts"], padding=True, truncation=True, return_tensors="pt")["input_ids"]
    found["processor_tokens_equal"] = torch.equal(padded, expected["input_ids"][:, : padded.shape[1]])

    with torch.no_grad():
        lengths = (expected["input_ids"] != config.pad_token_id).sum(1)
        output = model(input_ids=expected["input_ids"], pixel_values=expected["pixel_values"], lengths=lengths)
        for name in ("image_embeds", "text_embeds", "logits"):
            if name in expected:
                found[name] = _difference(getattr(output, name).float(), expected[name].float())
        if "generated" in expected:
            few = expected["pixel_values"][: len(expected["generated"])]
            generated = model.generate(pixel_values=few, do_sample=False, num_beams=1)
            found["captions_equal"] = torch.equal(generated, expected["generated"])
    found["forbidden_imports"] = [name for name in sys.modules if name == "mmscale" or name.startswith("mmscale.")]
    print(json.dumps(found))


def _difference(a, b) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
