"""A picture of pictures: images with the captions that the model wrote for them."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmscale.evaluate.captioning import exact_match

TILE, MARGIN, LINE, LINES, COLUMNS = 256, 12, 18, 4, 4  # pixels; lines of text below a picture
RIGHT, WRONG, INK, PAPER = (0, 110, 60), (178, 34, 34), (60, 60, 60), (255, 255, 255)


def draw_captions(
    pixels: Sequence[Tensor], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Image.Image:
    """A sheet of pictures, each above its caption.

    A caption is green when it is one of the references and red, with a reference below it, when it is not; without
    references it is black.

    Args:
        pixels: uint8 `[3, height, width]` each.
        references: of each picture, none or several.
    """
    font = ImageFont.load_default(size=14)
    columns = min(COLUMNS, len(pixels))
    rows = -(-len(pixels) // columns)
    cell_width, cell_height = TILE + 2 * MARGIN, TILE + 2 * MARGIN + LINES * LINE
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption, truths) in enumerate(zip(pixels, captions, references, strict=True)):
        left, top = number % columns * cell_width + MARGIN, number // columns * cell_height + MARGIN
        image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
        sheet.paste(image.resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
        for index, (line, colour) in enumerate(_lines(caption, truths)[:LINES]):
            draw.text((left, top + TILE + 4 + index * LINE), line, fill=colour, font=font)
    return sheet


def _lines(caption: str, truths: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    if not truths:
        return [(line, INK) for line in _wrap(caption)]
    if exact_match(caption, truths):
        return [(line, RIGHT) for line in _wrap(caption)]
    return [(line, WRONG) for line in _wrap(caption)] + [(line, INK) for line in _wrap(f"({truths[0]})")]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, width=36)[: LINES // 2] or ["(nothing)"]
