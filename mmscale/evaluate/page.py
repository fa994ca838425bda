"""Self-contained HTML pages with pictures in them. Whatever comes from data is escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .6rem; overflow-wrap: anywhere }
.card img { width: 100%; image-rendering: auto; border-radius: 4px; display: block }
.good { color: #067a3c } .bad { color: #b22222 } .muted { color: #777; font-size: .85em }
table { border-collapse: collapse } td, th { border: 1px solid #ddd; padding: .25rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left }
"""


def page(title: str, *sections: str) -> str:
    """A whole document; the title is escaped, the sections are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def cards(title: str, entries: Sequence[tuple[Tensor, Sequence[tuple[str, str]]]]) -> str:
    """A section of pictures, each with lines below it.

    Args:
        entries: uint8 pixels `[3, height, width]`, and (class, text) of each line: `good`, `bad`, `muted` or ``.
    """
    if not entries:
        return ""
    shown = "".join(f'<div class="card">{picture(pixels)}{_lines(lines)}</div>\n' for pixels, lines in entries)
    return f'<h2>{escape(title)}</h2>\n<div class="cards">{shown}</div>\n'


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A section with a table."""
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<h2>{escape(title)}</h2>\n<table><tr>{head}</tr>\n{body}</table>\n"


def heat_table(title: str, names: Sequence[str], matrix: np.ndarray) -> str:
    """A square matrix of counts `[rows, columns]`; the larger a cell's share of its row, the darker it is."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = ""
    for name, row in zip(names, matrix, strict=True):
        shares = row / max(1, row.sum())
        cells = "".join(
            f'<td style="background: rgba(36, 87, 214, {share:.3f}); color: {"#fff" if share > 0.5 else "#222"}">'
            f"{count}</td>"
            for count, share in zip(row, shares, strict=True)
        )
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>\n"
    return f"<h2>{escape(title)}</h2>\n<table><tr><th></th>{head}</tr>\n{body}</table>\n"


def picture(pixels: Tensor) -> str:
    """An `<img>` that carries its own data."""
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(data, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _lines(lines: Sequence[tuple[str, str]]) -> str:
    return "".join(f'<div class="{kind}">{escape(text)}</div>' for kind, text in lines)
