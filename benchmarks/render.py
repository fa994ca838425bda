"""The page of several result files: a table and a picture for every benchmark, all from the raw readings."""

import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

INTRODUCTION = """# Results

Made by `python -m benchmarks.run --render` from the raw readings in the result files of this folder: of each benchmark,
the newest on each machine. The command under a title measures it again.

Each figure is the median of its readings, with the 10th and 90th percentile; `n` says how many there are. A ratio is
taken pair by pair from readings that alternate."""


def render(paths: Iterable[Path], folder: Path) -> Path:
    """Writes README.md and one PNG a benchmark to `folder`; returns the page's path."""
    lines = [INTRODUCTION]
    machine = None
    for report in newest_reports(paths):
        if machine_of(report) != machine:
            machine = machine_of(report)
            lines += ["", f"Machine: {machine}."]
        lines += section(report, folder)
    page = folder / "README.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def newest_reports(paths: Iterable[Path]) -> list[dict]:
    """Of each benchmark on each machine the newest report; machine by machine, in the order of first appearance.

    A result file holds one report, as a benchmark's `--output` writes it, or several, as `benchmarks.run` does.
    """
    found: dict[tuple[str, str], dict] = {}
    for path in paths:
        content = json.loads(path.read_text())
        for report in content.get("benchmarks", [content]):
            report |= {"file": path.name}
            key = (machine_of(report), report["benchmark"])
            if key not in found or report["environment"]["date"] > found[key]["environment"]["date"]:
                found[key] = report
    machines = list(dict.fromkeys(machine for machine, _ in found))
    return sorted(found.values(), key=lambda report: (machines.index(machine_of(report)), report["benchmark"]))


def machine_of(report: dict) -> str:
    here = report["environment"]
    gpus = ", ".join(here["gpus"]) or "no GPU"
    return f"{gpus}; {here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB"


def section(report: dict, folder: Path) -> list[str]:
    here = report["environment"]
    picture = folder / f"{report['benchmark'].replace(' ', '_')}{'_gpu' if here['gpus'] else ''}.png"
    _plot(report, picture)
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    changes = " with uncommitted changes" if here["uncommitted_changes"] else ""
    lines = [
        "",
        f"## {report['benchmark']}",
        "",
        f"`{report['command']}`",
        "",
        f"{here['date'][:10]}, commit `{here['commit']}`{changes}, Python {here['python']}, {packages};"
        f" readings in [{report['file']}]({report['file']}).",
        "",
        f"![{report['benchmark']}]({picture.name})",
        "",
        "| case | median | p10 | p90 | unit | n |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for row in report["results"]:
        facts = ", ".join(f"{key} {value}" for key, value in row["facts"].items())
        name = f"{row['case']} ({facts})" if facts else row["case"]
        figures = " | ".join(_figure(np.percentile(row["readings"], q)) for q in (50, 10, 90))
        lines.append(f"| {name.replace('|', '/')} | {figures} | {row['unit']} | {len(row['readings'])} |")
    return lines


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _plot(report: dict, path: Path) -> None:
    """One row of bars for each unit, since only equal units share an axis; whiskers from p10 to p90."""
    units = list(dict.fromkeys(row["unit"] for row in report["results"]))
    rows = {unit: [row for row in report["results"] if row["unit"] == unit] for unit in units}
    heights = [len(rows[unit]) + 1 for unit in units]
    figure, axes = plt.subplots(
        len(units),
        1,
        figsize=(9, 0.3 * sum(heights) + 0.35 * len(units) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, unit in zip(axes[:, 0], units, strict=True):
        shown = rows[unit][::-1]
        p10, medians, p90 = np.transpose([np.percentile(row["readings"], (10, 50, 90)) for row in shown])
        labels = _labels(shown)
        axis.barh(range(len(shown)), medians, xerr=[medians - p10, p90 - medians], color="#4878a8", ecolor="#333333")
        axis.set_yticks(range(len(shown)), labels)
        axis.set_xlabel(unit)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if unit == "ratio":
            axis.axvline(1.0, color="#999999", linewidth=0.8)
    figure.suptitle(report["benchmark"], fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _labels(rows: list[dict]) -> list[str]:
    """Case and those facts that tell the rows of an axis apart."""
    keys = dict.fromkeys(key for row in rows for key in row["facts"])
    telling = [key for key in keys if len({str(row["facts"].get(key)) for row in rows}) > 1]
    return [
        " ".join([row["case"], *(f"{key}={row['facts'][key]}" for key in telling if key in row["facts"])])[:70]
        for row in rows
    ]
