"""Loads an exported folder as a stranger would, and reports how far its outputs are from the trained model's.

Run as a script, in a process of its own: `python -I stock_check.py FOLDER REFERENCE`. It sees only what a stranger has,
torch, transformers, pillow and what these require, so that an export cannot lean on mmscale, or on a package that
mmscale uses, by accident. FOLDER's own code is executed here, after `mmscale.export.verify` has compared it with the
code it was copied from.

REFERENCE holds `reference.json` (texts), `reference.safetensors` (what the trained model gives), and pictures. Prints
one line of JSON: the largest differences, and what does not agree at all.
"""

import json
import re
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

ALLOWED = ("torch", "transformers", "pillow")


class _StrangersPathFinder:
    """Finds the standard library and the allowed packages; everything else that is installed is not there."""

    def __init__(self):
        self.allowed = _with_requirements(ALLOWED)
        self.owners = packages_distributions()

    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        owners = self.owners.get(package, [])
        if package == "mmscale" or (owners and not any(_canonical(owner) in self.allowed for owner in owners)):
            return None
        return PathFinder.find_spec(name, path, target)

    def find_distributions(self, *context):
        return PathFinder.find_distributions(*context)


def _with_requirements(packages) -> set[str]:
    """The packages and all that they require, optional extras left out."""
    waiting, found = [_canonical(package) for package in packages], set()
    while waiting:
        package = waiting.pop()
        if package in found:
            continue
        try:
            requirements = requires(package) or []
        except PackageNotFoundError:  # for another platform or Python
            continue
        found.add(package)
        waiting += [_canonical(re.match(r"[\w.-]+", line)[0]) for line in requirements if "extra ==" not in line]
    return found


def _canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def main(folder: str, reference: str) -> None:
    # Without the finders of packages that are installed in place, as mmscale may be.
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, _StrangersPathFinder()]
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

    pictures = [Image.open(path) for path in sorted(Path(reference).glob("picture_*"))]
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
        for name, scores in (output.head_logits or {}).items():
            found[f"head_{name}"] = _difference(scores.float(), expected[f"head_{name}"].float())
        if "generated" in expected:
            few = expected["pixel_values"][: len(expected["generated"])]
            generated = model.generate(pixel_values=few, do_sample=False, num_beams=1)
            found["captions_equal"] = torch.equal(generated, expected["generated"])
    strangers = ("mmscale", "torchvision", "sentencepiece", "simplejpeg", "deepspeed")
    found["forbidden_imports"] = [name for name in strangers if name in sys.modules]
    print(json.dumps(found))


def _difference(a, b) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
