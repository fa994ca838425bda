"""Method `prompts`: prompts searched among words or learned as vectors, scored on dev and, once, on test."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmscale.adapt.base import load_base
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.labels import check_splits
from mmscale.adapt.prompts.classes import find_classes
from mmscale.adapt.prompts.learn import learn_classes, learn_guides
from mmscale.adapt.prompts.settings import PromptsConfig
from mmscale.adapt.prompts.triggers import find_triggers
from mmscale.adapt.prompts.words import WordSearch, write_templates
from mmscale.errors import UserError
from mmscale.evaluate.ranks import launched_ranks, rank_and_world_size


def tune_prompts(config: AdaptConfig) -> int:
    """Does what `adapt.prompts` says; returns the exit code. Raises UserError.

    `run.dir` then holds `report.json`; for kind `words`, `templates.txt` for `eval.templates`; and for the kinds that
    train, what a training run leaves.
    """
    settings = config.adapt.prompts
    if settings is None:
        raise UserError("adapt.prompts: is required by method prompts: at least its kind and its label")
    if config.data.val is None:
        raise UserError("data.val: is required: the dev split that prompts are chosen by")
    check_splits(config.data)
    if settings.kind in ("words", "triggers"):
        with launched_ranks() as device:
            return _search(config, settings, device)
    learn = learn_guides if settings.kind == "guide" else learn_classes
    code, report = learn(config, settings)
    if report is not None and rank_and_world_size()[0] == 0:
        _write_report(Path(config.run.dir), report)
    return code


def _search(config: AdaptConfig, settings: PromptsConfig, device: torch.device) -> int:
    """Kinds `words` and `triggers`: nothing is trained."""
    base = load_base(config)
    base.model.to(device)
    classes = find_classes(config, settings.label, settings.classes, "adapt.prompts")
    if settings.kind == "words":
        report = WordSearch(config, base, classes).run()
    else:
        report = find_triggers(config, base, classes)
    if rank_and_world_size()[0] == 0:
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        if settings.kind == "words":
            write_templates(folder, report)
        _write_report(folder, report)
    return 0


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    """`report.json`, and its `scores` (row -> name -> number) as a table on the terminal."""
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = report["scores"]
    names = list(next(iter(rows.values())))
    table = Table(title=f"{folder / 'report.json'}: {report['scored_on']}", title_justify="left")
    table.add_column("prompt")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row, found in rows.items():
        table.add_row(row, *(f"{found[name]:.3f}" for name in names))
    Console().print(table)
