"""What every benchmark needs: the environment on record, paired timings, medians with their spread, JSON and a table.

A result file holds all raw readings, so that any figure made of them can be made again.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "simplejpeg", "pillow", "numpy", "open_clip_torch")


def environment() -> dict:
    """The machine, the versions and the commit that a reading belongs to."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def paired(
    cases: dict[str, Callable[[], object]],
    rounds: int = 50,
    warmup: int = 2,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times the cases in turn, A B A B ..., so that a machine whose speed drifts is as fast for one as for the other.

    Args:
        rounds: readings of each case.
        seconds: stop earlier, after the round in which this much time has passed (never before the third).
        clock: `time.process_time` counts the CPU seconds of this process in place of the wall's.

    Returns:
        Seconds of each round, by case; the n-th readings of two cases belong together.
    """
    for _ in range(warmup):
        for run in cases.values():
            run()
    readings: dict[str, list[float]] = {name: [] for name in cases}
    begun = time.perf_counter()
    for number in range(rounds):
        for name, run in cases.items():
            start = clock()
            run()
            readings[name].append(clock() - start)
        if seconds is not None and number >= 2 and time.perf_counter() - begun > seconds:
            break
    return readings


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """The ratio of each pair of readings that were taken side by side."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


@dataclass
class Report:
    """The results of one benchmark, as a table on the terminal and as JSON."""

    benchmark: str
    results: list[dict] = field(default_factory=list)

    def add(self, case: str, unit: str, readings: list[float], better: str = "lower", **facts) -> float:
        """Records all readings of a case and returns their median.

        Args:
            better: `lower`, `higher`, or `neither` for a figure that is not to be optimised.
            facts: whatever tells this case from others (batch, world size, threads).
        """
        assert better in ("lower", "higher", "neither")
        p10, median, p90 = (float(np.percentile(readings, q)) for q in (10, 50, 90))
        self.results.append(
            {"case": case, "unit": unit, "better": better, "median": median, "p10": p10, "p90": p90}
            | {"n": len(readings), "facts": facts, "readings": [float(f"{value:.6g}") for value in readings]}
        )
        return median

    def finish(self, output: str | Path | None) -> None:
        """Prints the table, and writes the JSON file when a path is given."""
        from rich.console import Console
        from rich.table import Table

        table = Table("case", "median", "p10", "p90", "unit", "n", title=self.benchmark)
        for row in self.results:
            facts = " ".join(f"{key}={value}" for key, value in row["facts"].items())
            figures = (f"{row[key]:.4g}" for key in ("median", "p10", "p90"))
            table.add_row(f"{row['case']} [dim]{facts}[/dim]", *figures, row["unit"], str(row["n"]))
        Console().print(table)
        if output:
            content = {"benchmark": self.benchmark, "command": command_line(), "environment": environment()}
            write_json(output, content | {"results": self.results})


def command_line() -> str:
    """This process's command as anyone would type it, without the file that it writes to."""
    arguments = sys.argv[1:]
    for number, argument in enumerate(arguments):
        if argument == "--output":
            arguments = arguments[:number] + arguments[number + 2 :]
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments])


def write_json(path: str | Path, content: dict) -> None:
    """A file with one line for each list of numbers, so that raw readings do not take a line each."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--quick", action="store_true", help="fewer readings, smaller cases")
    result.add_argument("--output", help="JSON file to write")
    return result


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    ended = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return ended.stdout.strip()
