"""Pictures of pictures: held-out images with the captions the model writes for them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mmscale.config import Paths
from mmscale.evaluate.captioning import Caption, generate_captions
from mmscale.evaluate.command import eval_config, open_split
from mmscale.evaluate.encoding import model_device
from mmscale.pretrained import Pretrained

TILE, MARGIN, LINE = 256, 12, 18
WRONG, RIGHT, PAPER, INK = (178, 34, 34), (0, 110, 60), (255, 255, 255), (60, 60, 60)


def caption_gallery(pretrained: Pretrained, shards: Paths, out: str | Path, count: int = 12) -> list[Caption]:
    """Captions the first `count` pictures of a split and draws them, with their captions, into a PNG file.

    A caption is green when it is one of the references, red when it is not, with a reference below it.

    Returns:
        The captions, in the order of the picture.
    """
    eval_set = open_split(pretrained, shards, eval_config(pretrained, {"samples": count, "batch": count}))
    pictures, captions = [], []
    for batch in eval_set:
        pixel_values = batch.pixel_values.to(model_device(pretrained.model))
        generated = generate_captions(pretrained.model, pretrained.tokenizer, pixel_values)
        for row in batch.valid.nonzero().flatten().tolist():
            pictures.append(_to_image(batch.pixel_values[row]))
            captions.append(Caption(int(batch.positions[row]), batch.keys[row], generated[row], batch.captions[row]))
    draw_captions(pictures, captions).save(out)
    return captions


def draw_captions(pictures: Sequence[Image.Image], captions: Sequence[Caption], columns: int = 4) -> Image.Image:
    """A grid of pictures with their captions below them."""
    font = ImageFont.load_default(size=14)
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    cell_width, cell_height = TILE + 2 * MARGIN, TILE + 2 * MARGIN + 4 * LINE
    sheet = Image.new("RGB", (columns * cell_width, max(1, rows) * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = number % columns * cell_width + MARGIN
        top = number // columns * cell_height + MARGIN
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
        lines = [(line, RIGHT if caption.matches else WRONG) for line in _wrap(caption.generated)]
        if not caption.matches:
            lines += [(line, INK) for line in _wrap(f"({caption.references[0]})")]
        for index, (line, colour) in enumerate(lines[:4]):
            draw.text((left, top + TILE + 4 + index * LINE), line, fill=colour, font=font)
    return sheet


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, width=34)[:2] or ["(empty)"]


def _to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
