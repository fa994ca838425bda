"""The page: runs side by side, readable on a phone, in print and without a network."""

import base64
import binascii
import time
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmscale.checkpoint import write_whole
from mmscale.errors import UserError
from mmscale.report.charts import Line, line_chart, short
from mmscale.report.runs import Run, read_runs

CHARTS = [
    ("loss", "Loss"),
    ("loss_contrastive", "Contrastive loss"),
    ("loss_caption", "Captioning loss"),
    ("lr", "Learning rate"),
    ("grad_norm", "Gradient norm, before clipping"),
    ("logit_scale", "Logit scale"),
    ("samples_per_s", "Throughput, samples/s"),
    ("mfu", "Model FLOPs utilisation"),
    ("step_s", "Step time, s"),
    ("data_wait_s", "Wait for data, s a step"),
    ("mem_gib", "Memory, GiB"),
    ("skipped", "Skipped updates, in all"),
    ("bad_samples", "Bad samples, in all"),
]
MARKED = {"resume": "resumed", "preempted": "preempted", "save_failed": "save failed", "skip": "update skipped"}
MOST_EVENTS, MOST_BAD = 200, 50


def write_report(paths: list[str | Path], out: str | Path) -> Path:
    """Writes the page about the runs in `paths` to the file `out`. Raises UserError."""
    out = Path(out)
    page = render(read_runs(paths))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page, replace=True)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None
    return out


def render(runs: list[Run]) -> str:
    """The whole page as text. Everything that comes from a run's files is escaped."""
    names = " · ".join(run.name for run in runs)
    style, script = (files("mmscale.report").joinpath(name).read_text() for name in ("page.css", "page.js"))
    sections = [
        ("Summary", _summary(runs)),
        ("Curves", _curves(runs)),
        ("Scores", _scores(runs)),
        ("Captions", _captions(runs)),
        ("Configuration", _configuration(runs)),
        ("Events", _events(runs)),
        ("Bad samples", _bad_samples(runs)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(names)} - mmscale</title><style>{style}</style></head><body>'
        f"<header><h1>{escape(names)}</h1><p>mmscale report, {_moment(time.time())}</p></header>"
        f"<main>{body}</main><script>{script}</script></body></html>\n"
    )


def _summary(runs: list[Run]) -> str:
    def row(run: Run, number: int) -> list[str]:
        last = run.metrics[-1] if run.metrics else {}
        rates = sorted(value for _, value in run.series("samples_per_s"))
        status = str(run.status.get("status", "unknown"))
        reason = run.status.get("reason")
        return [
            f'<span class="key c{number % 8}"></span>{escape(run.name)}',
            f'<span class="chip {escape(status, quote=True)}">{escape(status)}</span>'
            + (f" {escape(str(reason))}" if reason else ""),
            _cell(last.get("step")),
            _cell(last.get("samples")),
            _cell(last.get("epoch")),
            _cell(last.get("loss")),
            _cell(rates[len(rates) // 2] if rates else None),
            _cell(last.get("skipped")),
            _cell(last.get("bad_samples")),
            str(sum(event["event"] == "resume" for event in run.events)),
        ]

    heads = ["Run", "Status", "Step", "Samples", "Epoch", "Loss", "Samples/s (median)", "Skipped", "Bad", "Resumes"]
    return _table(heads, (row(run, number) for number, run in enumerate(runs)))


def _curves(runs: list[Run]) -> str:
    marks = [
        (event["samples"], f"{run.name}: {MARKED[event['event']]} at step {event['step']}")
        for run in runs
        for event in run.events
        if event["event"] in MARKED
    ]
    parts = sorted({key for run in runs for line in run.metrics for key in line if key.startswith("grad_norm_")})
    titles = [*CHARTS, *((key, f"Gradient norm of {key.removeprefix('grad_norm_')}") for key in parts)]
    charts = [line_chart(title, _lines(runs, key), marks=marks) for key, title in titles]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "<p>No step has been logged yet.</p>"


def _scores(runs: list[Run]) -> str:
    keys = _score_names(runs)
    if not keys:
        return ""
    rows = (
        [escape(key), *(_cell(run.evaluations[-1].get(key) if run.evaluations else None) for run in runs)]
        for key in keys
    )
    table = _table(["Latest evaluation", *(escape(run.name) for run in runs)], rows)
    charts = [line_chart(key, _lines(runs, key)) for key in keys if not key.startswith("num_")]
    return f'{table}<div class="charts">{"".join(charts)}</div>'


def _score_names(runs: list[Run]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for line in run.evaluations for key in line)
    return [key for key in keys if key not in ("step", "samples")]


def _lines(runs: list[Run], key: str) -> list[Line]:
    return [Line(run.name, number, run.series(key)) for number, run in enumerate(runs)]


def _captions(runs: list[Run]) -> str:
    blocks = []
    for run in runs:
        cards = []
        for example in run.examples:
            references = [str(text) for text in example.get("references", [])]
            generated = str(example.get("generated", ""))
            verdict = "right" if generated in references else "other"
            text = escape(generated) or "(nothing)"
            truth = escape(references[0]) if references else ""
            cards.append(
                f'<figure class="card">{_picture(example)}<figcaption><b class="{verdict}">{text}</b>'
                f"<span>{truth}</span></figcaption></figure>"
            )
        if cards:
            step = escape(str(run.examples[0].get("step")))
            blocks.append(f'<h3>{escape(run.name)}, step {step}</h3><div class="cards">{"".join(cards)}</div>')
    note = "<p>Bold: what the model wrote; below: what people wrote.</p>"
    return note + "".join(blocks) if blocks else ""


def _picture(example: dict[str, Any]) -> str:
    try:
        jpeg = base64.b64decode(str(example.get("jpeg", "")), validate=True)
    except binascii.Error:
        return ""
    encoded = base64.b64encode(jpeg).decode()
    return f'<img alt="{escape(str(example.get("key", "")), quote=True)}" src="data:image/jpeg;base64,{encoded}">'


def _configuration(runs: list[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if not keys:
        return ""
    heads = ["Key", *(escape(run.name) for run in runs)]
    differing = [key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1]

    def rows(names: list[str]) -> Iterable[list[str]]:
        return (
            [f"<code>{escape(key)}</code>", *(escape(str(run.config.get(key, "-"))) for run in runs)] for key in names
        )

    everything = f"<details><summary>All {len(keys)} settings</summary>{_table(heads, rows(keys))}</details>"
    if len(runs) == 1:
        return everything
    return (_table(heads, rows(differing)) if differing else "<p>No setting differs.</p>") + everything


def _events(runs: list[Run]) -> str:
    moments = sorted(((event, run) for run in runs for event in run.events), key=lambda item: item[0].get("time", 0))
    if not moments:
        return ""

    def row(event: dict[str, Any], run: Run) -> list[str]:
        known = ("event", "step", "samples", "time")
        facts = ", ".join(f"{key} {_plain(value)}" for key, value in event.items() if key not in known and value)
        moment = _moment(event.get("time", 0))
        return [moment, escape(run.name), escape(str(event["event"])), _cell(event.get("step")), escape(facts)]

    rows = [row(event, run) for event, run in moments[-MOST_EVENTS:]]
    left_out = len(moments) - len(rows)
    note = f"<p>The latest {len(rows)} of {len(moments)}.</p>" if left_out else ""
    return note + _table(["When", "Run", "Event", "Step", "Facts"], rows)


def _bad_samples(runs: list[Run]) -> str:
    bad = [(run, sample) for run in runs for sample in run.bad_samples]
    if not bad:
        return ""
    rows = (
        [escape(run.name), *(escape(str(sample.get(key, ""))) for key in ("position", "shard", "key", "reason"))]
        for run, sample in bad[:MOST_BAD]
    )
    note = f"<p>The first {MOST_BAD} of {len(bad)}.</p>" if len(bad) > MOST_BAD else ""
    return note + _table(["Run", "Position", "Shard", "Sample", "Reason"], rows)


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    return short(value) if isinstance(value, int | float) else "n/a"


def _plain(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
