"""Maps over pictures: what matters stays bright, the rest is dimmed, and the peak is framed."""

from collections.abc import Sequence
from html import escape

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

SIDE, MARGIN, LINE, COLUMNS = 192, 8, 20, 8  # pixels of a drawn picture, around it, of the text below; in a row
DIM = 0.25  # brightness where nothing matters
FRAME, INK, PAPER = (255, 255, 255), (40, 40, 40), (255, 255, 255)

Map = tuple[str, Tensor | None]  # what it is of, and [rows, columns]; None for the picture alone


def overlay(pixels: Tensor, relevance: Tensor | None, side: int = SIDE) -> Tensor:
    """uint8 [3, side, side] of a picture, uint8 [3, height, width], with a map [rows, columns] over it."""
    picture = _resized(pixels.float(), side)
    if relevance is None:
        return picture.round().clamp(0, 255).to(torch.uint8)
    shares = relevance.float().clamp(min=0)
    shares = shares / shares.max().clamp(min=1e-12)
    bright = _resized(shares[None], side).clamp(0, 1)
    drawn = (picture * (DIM + (1 - DIM) * bright)).round().clamp(0, 255).to(torch.uint8)
    rows, columns = relevance.shape
    if not shares.any():  # nothing speaks for it, so there is no peak
        return drawn
    row, column = divmod(int(relevance.argmax()), columns)
    _frame(
        drawn, row * side // rows, (row + 1) * side // rows, column * side // columns, (column + 1) * side // columns
    )
    return drawn


def sheet(pixels: Tensor, maps: Sequence[Map]) -> Image.Image:
    """The maps of one picture side by side, with what each is of below it."""
    font = ImageFont.load_default(size=14)
    cell = SIDE + 2 * MARGIN
    rows = -(-len(maps) // COLUMNS)
    image = Image.new("RGB", (cell * min(len(maps), COLUMNS), (cell + LINE) * rows), PAPER)
    draw = ImageDraw.Draw(image)
    for number, (title, relevance) in enumerate(maps):
        drawn = overlay(pixels, relevance).permute(1, 2, 0).contiguous().numpy()
        left, top = number % COLUMNS * cell + MARGIN, number // COLUMNS * (cell + LINE)
        image.paste(Image.fromarray(drawn), (left, top + MARGIN))
        draw.text((left, top + cell), title[:26], fill=INK, font=font)
    return image


def shaded_words(title: str, words: Sequence[str], relevance: Sequence[float]) -> str:
    """A line of HTML: words on a background that is the darker, the more each matters."""
    most = max(max(relevance, default=0.0), 1e-12)
    spans = [
        f'<span style="background: rgba(36, 87, 214, {0.6 * max(value, 0.0) / most:.3f}); padding: 0 .2em" '
        f'title="{value:.3f}">{escape(word)}</span>'
        for word, value in zip(words, relevance, strict=True)
    ]
    return f'<div><span class="muted">{escape(title)}</span> {" ".join(spans)}</div>\n'


def _resized(image: Tensor, side: int) -> Tensor:
    return interpolate(image[None], size=(side, side), mode="bilinear", align_corners=False)[0]


def _frame(drawn: Tensor, top: int, bottom: int, left: int, right: int, width: int = 2) -> None:
    colour = torch.tensor(FRAME, dtype=torch.uint8)[:, None, None]
    for rows in (slice(top, top + width), slice(bottom - width, bottom)):
        drawn[:, rows, left:right] = colour
    for columns in (slice(left, left + width), slice(right - width, right)):
        drawn[:, top:bottom, columns] = colour
