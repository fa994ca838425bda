"""The page of a result file: a table and a picture for every benchmark, all from the raw readings."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def render(path: Path) -> Path:
    """Writes README.md and one PNG a benchmark beside the result file; returns the page's path."""
    content = json.loads(path.read_text())
    machine = content["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        "# Results",
        "",
        f"Made by `python -m benchmarks.run --render {path.name}` from the raw readings in [{path.name}]({path.name}),",
        f"which `{content['command']}` wrote on {machine['date'][:10]} at commit `{machine['commit']}`"
        f"{' with uncommitted changes' if machine['uncommitted_changes'] else ''}.",
        "",
        f"Machine: {', '.join(machine['gpus']) or 'no GPU'}; {machine['cpu']}, {machine['cores']} cores,"
        f" {machine['memory_gib']} GiB; Python {machine['python']}; {packages}.",
        "",
        "Each figure is the median of its readings, with the 10th and 90th percentile; `n` says how many there are. A",
        "ratio is taken pair by pair from readings that alternate.",
    ]
    for report in content["benchmarks"]:
        picture = path.parent / f"{report['benchmark'].replace(' ', '_')}.png"
        _plot(report, picture)
        lines += [
            "",
            f"## {report['benchmark']}",
            "",
            f"`{report['command']}`",
            "",
            f"![{report['benchmark']}]({picture.name})",
        ]
        lines += ["", "| case | median | p10 | p90 | unit | n |", "|---|---:|---:|---:|---|---:|"]
        for row in report["results"]:
            facts = ", ".join(f"{key} {value}" for key, value in row["facts"].items())
            name = f"{row['case']} ({facts})" if facts else row["case"]
            figures = " | ".join(_figure(row[key]) for key in ("median", "p10", "p90"))
            lines.append(f"| {name.replace('|', '/')} | {figures} | {row['unit']} | {row['n']} |")
    if content["failed"]:
        lines += ["", f"Not measured, since they failed here: {', '.join(content['failed'])}."]
    page = path.parent / "README.md"
    page.write_text("\n".join(lines) + "\n")
    return page


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
        figsize=(9, 0.32 * sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, unit in zip(axes[:, 0], units, strict=True):
        shown = rows[unit][::-1]
        medians = [row["median"] for row in shown]
        low = [max(0.0, row["median"] - row["p10"]) for row in shown]
        high = [max(0.0, row["p90"] - row["median"]) for row in shown]
        labels = [" ".join([row["case"], *(f"{k}={v}" for k, v in row["facts"].items())])[:70] for row in shown]
        axis.barh(labels, medians, xerr=[low, high], color="#4878a8", ecolor="#333333", capsize=2)
        axis.set_xlabel(unit)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report["benchmark"], fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
