"""What is left of an adaptation for people: scores for each class, and who was taken for whom."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn import metrics

from mmscale.adapt.matching import Matching
from mmscale.adapt.predictions import Prediction
from mmscale.pretrained import Pretrained

MAX_SHOWN_CLASSES = 40  # in a picture


def write_report(
    folder: Path, chosen: Pretrained, scores: dict[str, float], tasks: Sequence[Prediction | Matching]
) -> None:
    """Writes `report.json` and the pictures, and prints a table. Each task has been evaluated on the test split."""
    report = {"checkpoint": chosen.path.name, "samples": chosen.samples, "scores": scores, "tasks": {}}
    for task in tasks:
        facts = _describe(task)
        report["tasks"][task.name] = facts
        if isinstance(task, Prediction) and task.head.kind == "classification":
            _draw_confusion(task, folder / f"confusion_{task.name}.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    table = Table(title=f"test split, {chosen.path.name}", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def _describe(task: Prediction | Matching) -> dict[str, Any]:
    outcome = task.outcome
    if isinstance(task, Matching):
        return {"kind": "matching", "num_samples": len(outcome.keys)}
    facts: dict[str, Any] = {"kind": task.head.kind, "num_samples": len(outcome.keys)}
    if task.head.kind == "regression":
        return facts
    labels = task.head.labels
    predicted = outcome.scores.argmax(1) if task.head.kind == "classification" else outcome.scores > 0
    facts["per_class"] = metrics.classification_report(
        outcome.targets, predicted, labels=range(len(labels)), target_names=labels, output_dict=True, zero_division=0
    )
    return facts


def _draw_confusion(task: Prediction, path: Path) -> None:
    """Rows are the right classes, columns the predicted ones; the rarest are left out where there are too many."""
    from matplotlib.figure import Figure

    targets, predicted = task.outcome.targets, task.outcome.scores.argmax(1)
    shown = np.sort(
        np.argsort(-np.bincount(targets, minlength=len(task.head.labels)), kind="stable")[:MAX_SHOWN_CLASSES]
    )
    matrix = metrics.confusion_matrix(targets, predicted, labels=shown)
    side = 2.5 + 0.45 * len(shown)
    figure = Figure(figsize=(side, side), layout="constrained")
    names = [task.head.labels[number] for number in shown]
    display = metrics.ConfusionMatrixDisplay(matrix, display_labels=names)
    display.plot(ax=figure.subplots(), colorbar=False, xticks_rotation="vertical", cmap="Blues")
    figure.savefig(path, dpi=100)
