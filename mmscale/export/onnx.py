"""The two towers as ONNX files, for runtimes without PyTorch.

    OUT/image_encoder.onnx   pixel_values [batch, 3, size, size], normalised floats -> image_embeds [batch, dim]
        text_encoder.onnx    input_ids, attention_mask [batch, length], int64       -> text_embeds [batch, dim]
        processor_config.json, tokenizer*.json   pictures to pixels, texts to token ids

Both embeddings have unit length. Batch and length are free, up to the context. Captions are not part of it.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mmscale.errors import UserError
from mmscale.export.folder import whole_folder
from mmscale.export.hub import write_processor
from mmscale.export.tokenizer import fast_tokenizer
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.pretrained import load_pretrained

TOLERANCE = 1e-5
LARGEST_SINGLE_FILE = 1_500_000_000  # bytes of weights; an ONNX file itself cannot exceed 2 GB


def export_onnx(
    model: str | Path,
    out: str | Path,
    *,
    ema: bool = False,
    tokenizer: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes `out` whole or not at all, after onnxruntime has given the model's embeddings.

    Args:
        model: a run, a checkpoint or an exported folder.
        out: a folder that is empty or not there.

    Raises:
        UserError: nothing to export, `out` is not empty, a package is missing, or embeddings that differ.
    """
    _require_packages()
    pretrained = load_pretrained(model, dtype=torch.float32, device="cpu", tokenizer=tokenizer, ema=ema)
    with whole_folder(out) as folder:
        image, text = _Image(pretrained.model).eval(), _Text(pretrained.model).eval()
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=pretrained.context_length)
        pixel_values, tokens = _example(pretrained.model, batch=2, length=9)
        _write(image, pixel_values, folder / "image_encoder.onnx", "image_embeds", {0: batch})
        _write(text, tokens, folder / "text_encoder.onnx", "text_embeds", {0: batch, 1: length})
        pieces = pretrained.tokenizer
        fast = fast_tokenizer(pieces, Path(pieces.path).read_bytes(), pretrained.context_length)
        write_processor(folder, pretrained.model.config, fast)
        worst = 0.0
        for size, width in ((1, 2), (3, pretrained.context_length)):
            pixel_values, tokens = _example(pretrained.model, size, width)
            worst = max(worst, _difference(image, pixel_values, folder / "image_encoder.onnx"))
            worst = max(worst, _difference(text, tokens, folder / "text_encoder.onnx"))
        if worst > TOLERANCE:
            raise UserError(f"the ONNX files do not reproduce the trained model: embeddings differ by {worst:.2g}")
        say(f"run in onnxruntime; largest difference of the embeddings: {worst:.1g}")
    return Path(out)


class _Image(nn.Module):
    def __init__(self, model: MMScaleModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values)


class _Text(nn.Module):
    def __init__(self, model: MMScaleModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids, attention_mask)


def _example(model: MMScaleModel, batch: int, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random inputs of both towers; the last text is shorter than the others, where there is room for that."""
    size = model.config.vision_config.image_size
    draw = torch.Generator().manual_seed(batch)
    input_ids = torch.randint(4, model.config.vocab_size, (batch, length), generator=draw)
    attention_mask = torch.ones_like(input_ids)
    if length > 2:
        attention_mask[-1, length // 2 :] = 0
        input_ids[-1, length // 2 :] = model.config.pad_token_id
    pixel_values = torch.randn(batch, 3, size, size, generator=draw)
    return {"pixel_values": pixel_values}, {"input_ids": input_ids, "attention_mask": attention_mask}


def _write(tower: nn.Module, inputs: dict[str, Tensor], path: Path, output: str, free: dict) -> None:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in tower.parameters())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            tower,
            kwargs=inputs,
            f=path,
            input_names=list(inputs),
            output_names=[output],
            dynamo=True,
            dynamic_shapes=dict.fromkeys(inputs, free),
            external_data=weights > LARGEST_SINGLE_FILE,
            verbose=False,
        )


@torch.no_grad()
def _difference(tower: nn.Module, inputs: dict[str, Tensor], path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return float((torch.from_numpy(found) - tower(**inputs)).abs().max())


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs {error.name}: pip install onnx onnxruntime onnxscript") from None
