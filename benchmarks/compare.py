"""What became slower or faster between two result files, beyond the noise.

    python -m benchmarks.compare OLD.json NEW.json [--threshold 0.10]

A case has changed when its medians differ by more than the threshold *and* the spreads (p10 to p90) of the two do not
overlap: one alone is either noise or of no consequence. Ends with 1 when something has become worse, else with 0.
Times of two machines cannot be compared; then only ratios are, since both of their sides were taken on one machine.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

SAME_MACHINE = ("cpu", "cores", "gpus")


def read_cases(path: str) -> tuple[dict[tuple, dict], dict]:
    """The cases of a result file, keyed by benchmark, case and facts, and the environment they were taken in."""
    try:
        content = json.loads(Path(path).read_text())
        reports = content.get("benchmarks", [content])
        cases = {
            (report["benchmark"], row["case"], json.dumps(row["facts"], sort_keys=True)): row
            for report in reports
            for row in report["results"]
        }
        return cases, content["environment"]
    except FileNotFoundError:
        sys.exit(f"{path}: no such file")
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: not a result file of these benchmarks: {error!r}")


def change(old: dict, new: dict, threshold: float) -> str:
    """`worse`, `better` or `` (no change beyond the noise) for one case."""
    if old["better"] == "neither" or old["median"] == 0:
        return ""
    relative = new["median"] / old["median"] - 1
    overlap = new["p10"] <= old["p90"] and old["p10"] <= new["p90"]
    if abs(relative) <= threshold or overlap:
        return ""
    return "worse" if (relative > 0) == (old["better"] == "lower") else "better"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--threshold", type=float, default=0.10, help="relative change of a median that counts")
    args = parser.parse_args(argv)
    old, old_environment = read_cases(args.old)
    new, new_environment = read_cases(args.new)
    one_machine = all(old_environment.get(key) == new_environment.get(key) for key in SAME_MACHINE)
    common = [key for key in new if key in old and (one_machine or new[key]["unit"] == "ratio")]
    if not one_machine:
        print(f"Two machines ({old_environment.get('cpu')}, {new_environment.get('cpu')}): only ratios are compared.")

    table = Table("benchmark", "case", "old", "new", "change", "verdict")
    verdicts = []
    for key in common:
        verdict = change(old[key], new[key], args.threshold)
        verdicts.append(verdict)
        if verdict:
            before, after = old[key]["median"], new[key]["median"]
            figures = (f"{before:.4g}", f"{after:.4g}", f"{after / before - 1:+.1%}")
            table.add_row(key[0], f"{key[1]} {key[2] if key[2] != '{}' else ''}", *figures, verdict)
    if table.row_count:
        Console().print(table)
    print(
        f"{len(common)} cases compared: {verdicts.count('worse')} worse, {verdicts.count('better')} better; "
        f"{len(old.keys() - new.keys())} gone, {len(new.keys() - old.keys())} new."
    )
    return 1 if "worse" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
