"""What a run's folder says about it, for the launch scripts.

python launch/status.py prepare CONFIG [key.sub=value ...]        makes run.dir and prints it
python launch/status.py resolve FILE CONFIG [key.sub=value ...]   writes the resolved configuration
python launch/status.py outcome RUN_DIR --since TIME              prints how it ended; 0, 75, 2 or 1
python launch/status.py position RUN_DIR --since TIME             prints "SAMPLES REASON" of a failure, for comparison
"""

import argparse
import json
import sys
from pathlib import Path

CODES = {"finished": 0, "preempted": 75, "refused": 2, "stopped": 1, "failed": 1}
REFUSED = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("prepare", "resolve"):
        about_config = verbs.add_parser(verb)
        if verb == "resolve":
            about_config.add_argument("file", type=Path)
        about_config.add_argument("config")
        about_config.add_argument("overrides", nargs="*")
    for verb in ("outcome", "position"):
        about_run = verbs.add_parser(verb)
        about_run.add_argument("run_dir", type=Path)
        about_run.add_argument("--since", type=float, required=True, help="a status written before this is an old one")
        about_run.add_argument("--launcher-code", type=int, default=1)
    args = parser.parse_args()
    if args.verb == "prepare":
        return prepare_run(args.config, args.overrides)
    if args.verb == "resolve":
        return resolve(args.file, args.config, args.overrides)
    status = read_status(args.run_dir, args.since)
    if args.verb == "position":
        print(position(args.run_dir, status))
        return 0
    return outcome(args.run_dir, status, args.launcher_code)


def prepare_run(config: str, overrides: list[str]) -> int:
    """Makes the run's folder, so that every end of the run can be written there, and prints its absolute path."""
    from mmscale.config import load_config
    from mmscale.errors import UserError

    try:
        run_dir = Path(load_config(config, overrides).run.dir).absolute()
        run_dir.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"error: run.dir: {error}", file=sys.stderr)
        return REFUSED
    print(run_dir)
    return 0


def resolve(file: Path, config: str, overrides: list[str]) -> int:
    """Writes the configuration with its overrides, paths made absolute: other machines start elsewhere."""
    from mmscale.config import load_config

    resolved = load_config(config, overrides)
    resolved.run.dir = str(Path(resolved.run.dir).absolute())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(resolved.dump(), encoding="utf-8")
    return 0


def read_status(run_dir: Path, since: float) -> dict | None:
    """status.json, or None when this start of the run wrote none."""
    try:
        status = json.loads((run_dir / "status.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    # The clock of the machine that wrote it may differ a little from this one's.
    return status if status["time"] > since - 2 else None


def outcome(run_dir: Path, status: dict | None, launcher_code: int) -> int:
    """Prints one line and returns the exit code of a launch script."""
    if status is None:
        print(f"{run_dir}: ended without a word in status.json (launcher's code {launcher_code})", file=sys.stderr)
        return REFUSED if launcher_code == REFUSED else 1
    if status["status"] == "running":
        print(f"{run_dir}: killed while it was running (launcher's code {launcher_code})", file=sys.stderr)
        return 1
    reason = f": {status['reason']}" if status["reason"] else ""
    print(f"{run_dir}: {status['status']} at {status['samples']} samples{reason}", file=sys.stderr)
    return CODES[status["status"]]


def position(run_dir: Path, status: dict | None) -> str:
    """Where and why a run failed; `unknown` when it never got to start, which says nothing about the next time."""
    if status is None:
        return "unknown"
    if status["status"] != "running":
        return f"{status['samples']} {status['reason']}"
    try:
        logged = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["samples"]
    except (OSError, IndexError, KeyError, json.JSONDecodeError):
        logged = 0
    return f"{max(logged, status['samples'])} killed"


if __name__ == "__main__":
    sys.exit(main())
