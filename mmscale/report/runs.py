"""What a run's folder tells: its configuration, its numbers, its events, its examples."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmscale.errors import UserError


@dataclass(frozen=True)
class Run:
    """One run as its files describe it; lists are empty where a file is missing."""

    name: str
    path: Path
    config: dict[str, Any]
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    bad_samples: list[dict[str, Any]]

    def series(self, key: str) -> list[tuple[float, float]]:
        """(samples, value) of every line of metrics.jsonl, or else evaluations.jsonl, that has a number there."""
        for lines in (self.metrics, self.evaluations):
            points = [(line["samples"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
            if points:
                return points
        return []


def read_run(path: str | Path) -> Run:
    """Raises UserError when the folder is not a run's."""
    path = Path(path)
    if not (path / "metrics.jsonl").exists() and not (path / "config.yaml").exists():
        raise UserError(f"{path}: not a run's folder: neither metrics.jsonl nor config.yaml is there")
    examples = _read_lines(path / "examples.jsonl")
    return Run(
        name=path.resolve().name,
        path=path,
        config=_flatten(_read_config(path / "config.yaml")),
        status=_read_json(path / "status.json"),
        metrics=_read_lines(path / "metrics.jsonl"),
        evaluations=_read_lines(path / "evaluations.jsonl"),
        events=_read_lines(path / "events.jsonl"),
        examples=[example for example in examples if example["samples"] == examples[-1]["samples"]],
        bad_samples=_read_lines(path / "bad_samples.jsonl"),
    )


def read_runs(paths: list[str | Path]) -> list[Run]:
    """Runs with names that tell them apart. Raises UserError."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [Run(**{**vars(run), "name": str(run.path)}) for run in runs]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a run that is still going may be in the middle of one."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
