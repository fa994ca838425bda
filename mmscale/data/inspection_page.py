"""`mmscale inspect`: what is in the data, as tables on the terminal and as one HTML file that needs nothing else."""

from html import escape
from pathlib import Path

import numpy as np

from mmscale.config import DataConfig, Paths
from mmscale.data.inspection import PERCENTILES, Findings, examine
from mmscale.data.paths import expand
from mmscale.data.shards import Shards
from mmscale.data.tokenizer import Tokenizer

MOST_LISTED = 100

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a7bd0; --soft: #8881; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; min-width: 7rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-size: .85rem; margin-bottom: .3rem; }
svg rect { fill: var(--bar); } svg text { font-size: 11px; fill: currentColor; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid var(--line); } td.n { font-variant-numeric: tabular-nums; }
td.n, th.n { text-align: right; }
td { overflow-wrap: anywhere; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .9rem; }
.sheet div { background: var(--soft); border-radius: .5rem; padding: .5rem; font-size: .8rem; overflow-wrap: anywhere; }
.sheet img { display: block; margin: 0 auto .4rem; max-width: 100%; border-radius: .25rem; }
.sheet small { opacity: .6; }
"""


def inspect(
    shards: Paths,
    *,
    html: str | None = None,
    tokenizer: str | None = None,
    data: DataConfig | None = None,
    limit: int | None = None,
    contact_sheet: int = 48,
    threads: int = 4,
) -> Findings:
    """Reads and decodes the samples (the first `limit` of them), prints tables, and writes the page `html`.

    tokenizer: SentencePiece model whose tokens captions are counted in; words without it. Damaged shards are read as
    far as they go. Raises UserError.
    """
    data = (data or DataConfig()).model_copy(update={"on_damaged_shard": "use_rest"})
    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    opened = Shards(expand(shards), data)
    findings = examine(opened, data, loaded, limit, contact_sheet, threads)
    print_tables(findings)
    if html:
        write_page(findings, Path(html))
        print(f"{html}: written")
    return findings


def print_tables(findings: Findings) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, header, rows in _tables(findings):
        if rows:
            table = Table(title=title, title_justify="left")
            for number, name in enumerate(header):
                table.add_column(name, justify="left" if number == 0 or not _is_number(rows[0][number]) else "right")
            for row in rows:
                table.add_row(*[_plain(cell) for cell in row])
            console.print(table)


def write_page(findings: Findings, path: Path) -> None:
    """Everything that comes from the data is escaped. Raises OSError."""
    tiles = "".join(f'<div class="tile"><b>{value:,}</b>{escape(name)}</div>' for name, value in _summary(findings))
    charts = "".join(_histogram(name, values) for name, values in findings.values.items() if values)
    if len(set(findings.shard_sizes)) > 1:
        charts += _histogram("samples of a shard", findings.shard_sizes)
    sheet = "".join(
        f'<div><img alt="" src="data:image/jpeg;base64,{thumbnail.jpeg}">{escape(thumbnail.caption[:300])}'
        f"<br><small>{escape(thumbnail.key)}</small></div>"
        for thumbnail in findings.thumbnails
    )
    tables = "".join(
        f"<h2>{escape(title)}</h2>{_html_table(header, rows)}" for title, header, rows in _tables(findings)[1:] if rows
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Data inspection</title><style>{_STYLE}</style>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><h1>What is in the data</h1>'
        f'<div class="tiles">{tiles}</div><h2>Distributions</h2><div class="charts">{charts}</div>'
        f'{tables}<h2>Contact sheet</h2><div class="sheet">{sheet}</div></html>\n'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")


def _summary(findings: Findings) -> list[tuple[str, int]]:
    return [
        ("shards", findings.num_shards),
        ("samples", findings.num_samples),
        ("bytes", findings.num_bytes),
        ("samples read", findings.num_read),
        ("broken", len(findings.broken)),
        ("repeated images", findings.duplicates(findings.same_image)),
        ("repeated captions", findings.duplicates(findings.same_caption)),
    ]


def _tables(findings: Findings) -> list[tuple[str, list[str], list[list]]]:
    """(title, header, rows) of each table."""
    names = ["smallest", *[f"p{p}" if p != 50 else "median" for p in PERCENTILES[1:-1]], "largest"]
    good = max(1, sum(findings.formats.values()))
    return [
        ("Data", ["what", "number"], [[name, value] for name, value in _summary(findings)]),
        (
            "Percentiles",
            ["property", *names],
            [[name, *findings.percentiles(name)] for name, values in findings.values.items() if values],
        ),
        (
            "Formats",
            ["format and mode", "samples", "share"],
            [[name, count, f"{100 * count / good:.1f} %"] for name, count in findings.formats.most_common()],
        ),
        ("Broken samples", ["sample", "reason"], [list(entry) for entry in findings.broken[:MOST_LISTED]]),
        ("Images that come more than once", ["first sample", "times"], _repeated(findings.same_image)),
        ("Captions that come more than once", ["first sample", "times"], _repeated(findings.same_caption)),
    ]


def _repeated(groups: list[tuple[int, str]]) -> list[list]:
    return [[key, count] for count, key in groups[:20]]


def _html_table(header: list[str], rows: list[list]) -> str:
    numeric = [_is_number(cell) for cell in rows[0]]
    classes = [' class="n"' if is_number else "" for is_number in numeric]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(classes, header, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(_text(cell))}</td>" for kind, cell in zip(classes, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _histogram(name: str, values: list[float], bins: int = 32, width: int = 320, height: int = 110) -> str:
    """An inline SVG; the largest hundredth of the values shares the last bar."""
    array = np.asarray(values, dtype=np.float64)
    low, high = array.min(), np.percentile(array, 99)
    if high - low < bins and (array == array.round()).all():  # a bar for every whole number
        low, high, bins = low - 0.5, np.ceil(high) + 0.5, int(np.ceil(high) - low) + 1
    elif high <= low:
        high = low + 1
    counts, edges = np.histogram(array.clip(low, high - 1e-9), bins=bins, range=(low, high))
    step = width / bins
    bars = "".join(
        f'<rect x="{number * step:.1f}" y="{height - h:.1f}" width="{step - 1:.1f}" height="{h:.1f}">'
        f"<title>{_text(float(edges[number]))} to {_text(float(edges[number + 1]))}: {count:,}</title></rect>"
        for number, count in enumerate(counts.tolist())
        if (h := height * count / counts.max()) > 0
    )
    labels = f'<text x="0" y="{height + 14}">{_text(float(array.min()))}</text>'
    labels += f'<text x="{width}" y="{height + 14}" text-anchor="end">{_text(float(min(high, array.max())))}</text>'
    return (
        f"<figure><figcaption>{escape(name)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height + 18}" width="100%">{bars}{labels}</svg></figure>'
    )


def _is_number(cell: object) -> bool:
    return isinstance(cell, (int, float)) or (isinstance(cell, str) and cell.endswith(" %"))


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 or cell == int(cell) else f"{cell:.2f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _plain(cell: object) -> str:
    """For a terminal: no markup, no control characters."""
    from rich.markup import escape as escape_markup

    return escape_markup("".join(c if c.isprintable() else "?" for c in _text(cell)))
