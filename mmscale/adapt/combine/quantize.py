"""Method `quantize`: a model with 8-bit weights as an exported folder, with its size, speed and scores beside the
original's. What is rounded, and how it computes, is in `mmscale/model/int8.py`.
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from mmscale.adapt.base import load_base
from mmscale.adapt.combine.sources import check_alone, evaluate, print_scores, write_report
from mmscale.adapt.config import AdaptConfig
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.captioning import generate_captions
from mmscale.export.card import CardFacts, model_card
from mmscale.export.folder import whole_folder
from mmscale.export.hub import write_all_but_weights
from mmscale.export.verify import verify_export
from mmscale.model.int8 import int8_weights
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.pretrained import Pretrained, load_pretrained


def quantize(config: AdaptConfig) -> int:
    """Makes `run.dir` an exported folder with 8-bit weights, and adds `report.json` to it."""
    check_alone("quantize")
    base = load_base(config)
    if base.model.config.int8:
        raise UserError(f"model.init_from: {base.path} holds 8-bit weights already")
    base.model.float()
    export_int8(base, config.run.dir)
    small = load_pretrained(config.run.dir, device="cpu")
    report = {
        "base": str(base.path),
        "bytes": {"fp32": _bytes(base.model.state_dict()), "int8": _bytes(small.model.state_dict())},
        "file_bytes": sum(path.stat().st_size for path in Path(config.run.dir).glob("*.safetensors")),
        "threads": torch.get_num_threads(),
        "pictures": config.adapt.quantize.batch,
        "seconds": _speeds(config, base, small),
    }
    _print_costs(report)
    for split in ("val", "test"):
        if (shards := getattr(config.data, split)) is not None:
            models = {"fp32": base, "int8": small}
            scores = {name: evaluate(config, model, shards, f"data.{split}") for name, model in models.items()}
            report[split] = scores
            print_scores(f"{base.path}, and in 8 bits, on data.{split}", scores)
    write_report(config.run.dir, report)
    return 0


def export_int8(base: Pretrained, out: str | Path) -> None:
    """Writes the folder whole or not at all, after a process without mmscale has loaded it and found the same outputs.

    Raises UserError when `out` is not empty, or cannot be written.
    """
    config = copy.deepcopy(base.model.config)
    config.int8 = True
    model = MMScaleModel(config).eval()
    tensors = {name: tensor.contiguous() for name, tensor in int8_weights(base.model).items()}
    model.load_state_dict(tensors)
    pieces: Tokenizer = base.tokenizer
    with whole_folder(out) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_all_but_weights(folder, config, torch.float32, pieces, Path(pieces.path).read_bytes())
        facts = CardFacts(
            name=Path(out).name,
            num_parameters=sum(parameter.numel() for parameter in base.model.parameters()),
            dtype="int8",
            samples=base.samples or 0,
            step=base.step or 0,
        )
        (folder / "README.md").write_text(model_card(config, base.run, facts), encoding="utf-8")
        verify_export(folder, model, pieces)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _speeds(config: AdaptConfig, base: Pretrained, small: Pretrained) -> dict[str, dict[str, list[float]]]:
    """Seconds of one forward pass over a batch: what is done -> model -> [p10, median, p90], measured in turn."""
    size, count = base.image_size, config.adapt.quantize.batch
    pictures = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0))
    pictures = pictures.to(torch.uint8)
    work: dict[str, Callable[[Pretrained], object]] = {
        "embed pictures": lambda model: model.model.get_image_features(pictures)
    }
    if base.model.config.decoder_config.layers:
        work["write captions"] = lambda model: generate_captions(model.model, model.tokenizer, pictures)
    models, found = {"fp32": base, "int8": small}, {}
    for name, function in work.items():
        times: dict[str, list[float]] = {key: [] for key in models}
        for number in range(config.adapt.quantize.repeats + 2):
            for key, model in models.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    function(model)
                if number >= 2:  # the first passes warm up
                    times[key].append(time.perf_counter() - start)
        found[name] = {key: _quantiles(values) for key, values in times.items()}
    return found


def _quantiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 3
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return [deciles[0], deciles[4], deciles[8]]


def _print_costs(report: dict) -> None:
    sizes = report["bytes"]
    table = Table("", "fp32", "int8", "ratio", title="size and speed", title_justify="left")
    table.add_row(
        "weights, MB",
        f"{sizes['fp32'] / 1e6:.2f}",
        f"{sizes['int8'] / 1e6:.2f}",
        f"{sizes['int8'] / sizes['fp32']:.3f}",
    )
    for name, seconds in report["seconds"].items():
        before, after = (seconds[key][1] * 1000 for key in ("fp32", "int8"))
        title = f"{name}, ms for {report['pictures']}"
        table.add_row(title, f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}")
    Console().print(table)
