"""Runs every benchmark of this folder, each in a process of its own, and writes one result file and one page.

    python -m benchmarks.run [--quick] [--only loader,model]      --quick ends within 5 minutes on 2 cores
    python -m benchmarks.run --render RESULT.json                 the page again, from a file of raw readings

Writes benchmarks/results/<date>_<machine>_<commit>.json (environment, commands, raw readings) and,
from nothing but that file, benchmarks/results/README.md with its pictures.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, environment
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
    parser.add_argument("--only", help=f"comma-separated, of: {', '.join(available())}")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one benchmark may take")
    parser.add_argument("--render", metavar="RESULT.json", help="only make the page of an earlier result")
    args = parser.parse_args(argv)
    if args.render:
        print(render(Path(args.render)))
        return 0
    chosen = args.only.split(",") if args.only else available()
    unknown = set(chosen) - set(available())
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(available())}")

    here = environment()
    reports, failed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(chosen, start=1):
            print(f"== {number}/{len(chosen)} {name}", flush=True)
            output = Path(scratch) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", "--output", str(output)]
            begun = time.monotonic()
            try:
                code = subprocess.run(command + ["--quick"] * args.quick, cwd=ROOT, timeout=args.timeout).returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {args.timeout:.0f} s"
            if code == 0 and output.exists():
                report = json.loads(output.read_text())
                shown = ["python", "-m", f"benchmarks.{name}"] + ["--quick"] * args.quick
                reports.append(report | {"command": " ".join(shown), "seconds": round(time.monotonic() - begun, 1)})
            else:
                failed.append(name)
                print(f"{name} ended with {code}; the others go on", file=sys.stderr)
    if not reports:
        return 1
    machine = re.sub(r"[^A-Za-z0-9]+", "-", here["gpus"][0] if here["gpus"] else f"{here['cpu']} {here['cores']} cores")
    path = RESULTS / f"{here['date'][:10]}_{machine.strip('-')}_{here['commit'] or 'nocommit'}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"environment": here, "command": " ".join(["python -m benchmarks.run", *(argv or sys.argv[1:])])}
    path.write_text(json.dumps(content | {"failed": failed, "benchmarks": reports}, indent=1) + "\n")
    print(f"{path}\n{render(path)}")
    return 1 if failed else 0


def available() -> list[str]:
    """The benchmarks whose file is there."""
    return [name for name in BENCHMARKS if (ROOT / "benchmarks" / f"{name}.py").exists()]


if __name__ == "__main__":
    sys.exit(main())
