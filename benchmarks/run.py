"""Runs every benchmark of this folder, each in a process of its own, and writes one result file and one page.

    python -m benchmarks.run [--quick] [--only loader,model]      --quick ends within 5 minutes on 2 cores
    python -m benchmarks.run --render [RESULT.json ...]           the page again, from files of raw readings

Writes benchmarks/results/<date>_<machine>_<commit>.json (environment, commands, raw readings); what that file holds of
other benchmarks stays there. Then, from nothing but the result files of that folder, benchmarks/results/README.md with
its pictures: each benchmark's newest readings on each machine.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, command_line, environment, write_json
from benchmarks.render import render

# In this order; `--only` chooses among them. A peer (open_clip, MosaicML Streaming, ...) joins when it can be imported.
BENCHMARKS = (
    "loader",
    "model",
    "loss",
    "generate",
    "checkpoint",
    "overhead",
    "evaluate",
    "scaling",
    "resume",
    "end_to_end",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller cases and fewer readings")
    parser.add_argument("--only", help=f"comma-separated, of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one benchmark may take")
    parser.add_argument("--output", type=Path, help="write this file, and no page")
    parser.add_argument(
        "--render", nargs="*", metavar="RESULT.json", help="only make the page, of these files (default: all results)"
    )
    args = parser.parse_args(argv)
    if args.render is not None:
        print(render([Path(path) for path in args.render] or result_files(), RESULTS))
        return 0
    chosen = args.only.split(",") if args.only else list(BENCHMARKS)
    if unknown := set(chosen) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")

    here = environment()
    reports, failed = run(chosen, args.quick, args.timeout)
    if not reports:
        return 1
    path = args.output or RESULTS / result_name(here)
    if path.exists() and not args.output:
        measured = {report["benchmark"] for report in reports}
        earlier = json.loads(path.read_text())["benchmarks"]
        reports = [report for report in earlier if report["benchmark"] not in measured] + reports
    write_json(path, {"environment": here, "command": command_line(), "failed": failed, "benchmarks": reports})
    print(path)
    if not args.output:
        print(render(result_files(), RESULTS))
    return 1 if failed else 0


def run(chosen: list[str], quick: bool, timeout: float) -> tuple[list[dict], list[str]]:
    """The reports of the chosen benchmarks, and the names of those that failed."""
    reports, failed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(chosen, start=1):
            print(f"== {number}/{len(chosen)} {name}", flush=True)
            output = Path(scratch) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", *["--quick"] * quick, "--output", str(output)]
            begun = time.monotonic()
            try:
                code = subprocess.run(command, cwd=ROOT, timeout=timeout).returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {timeout:.0f} s"
            if code == 0 and output.exists():
                reports.append(json.loads(output.read_text()) | {"seconds": round(time.monotonic() - begun, 1)})
            else:
                failed.append(name)
                print(f"{name} ended with {code}; the others go on", file=sys.stderr)
    return reports, failed


def result_files() -> list[Path]:
    return sorted(RESULTS.glob("????-??-??_*.json"))


def result_name(here: dict) -> str:
    machine = here["gpus"][0] if here["gpus"] else f"{here['cpu']} {here['cores']} cores"
    machine = re.sub(r"[^A-Za-z0-9]+", "-", machine).strip("-")
    return f"{here['date'][:10]}_{machine}_{here['commit'] or 'nocommit'}.json"


if __name__ == "__main__":
    sys.exit(main())
