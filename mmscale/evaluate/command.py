"""What `mmscale eval` does: score a model on shards, print a table, keep the figures and what repeats them."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import mmscale
from mmscale.config import EvalConfig, Paths, validate
from mmscale.errors import UserError
from mmscale.evaluate.evaluation_page import evaluation_page, show_score
from mmscale.evaluate.ranks import launched_ranks, rank_and_world_size
from mmscale.evaluate.run import TASKS, Evaluation, run_evaluation
from mmscale.evaluate.splits import open_split
from mmscale.pretrained import Pretrained, load_pretrained


def evaluate_command(
    model: str | Path,
    shards: Paths,
    tasks: list[str] | None = None,
    *,
    settings: dict[str, Any] | None = None,
    output: str | Path | None = None,
    html: str | Path | None = None,
    tokenizer: str | Path | None = None,
    ema: bool = False,
    device: str | None = None,
) -> dict[str, float]:
    """Scores a run, a checkpoint or an exported folder; under a launcher all its ranks share the work.

    Args:
        shards: path, glob, braces or a list.
        tasks: of `zeroshot`, `retrieval`, `caption`, `vqa`; when unset those of the run's configuration
            that model and data allow.
        settings: keys of the `eval` section over those of the model's run.
        output: a JSON file for the scores and everything needed to repeat them.
        html: a page with the scores, who was taken for whom, and pictures of hits and misses.
        tokenizer, ema, device: as `load_pretrained` takes them.

    Returns:
        The scores.

    Raises:
        UserError: no such model, shards or task; a tokenizer of another vocabulary.
    """
    if unknown := set(tasks or ()) - set(TASKS):
        raise UserError(f"unknown task `{unknown.pop()}`; the tasks are {', '.join(TASKS)}")
    with launched_ranks(device) as place:
        pretrained = load_pretrained(model, device=place, tokenizer=tokenizer, ema=ema)
        config = eval_config(pretrained, settings)
        # As the model's run read its own: names of members, pixel limits.
        eval_set = open_split(
            shards,
            pretrained.model,
            pretrained.tokenizer,
            pretrained.data,
            batch_size=config.batch,
            limit=config.samples,
        )
        evaluation = run_evaluation(pretrained.model, pretrained.tokenizer, eval_set, tasks, config)
        if rank_and_world_size()[0] == 0:
            _print_table(evaluation, pretrained.path, shards)
            if output is not None:
                _write_scores(Path(output), evaluation, pretrained, shards, config)
            if html is not None:
                Path(html).write_text(evaluation_page(evaluation, pretrained, shards), encoding="utf-8")
    return evaluation.scores


def eval_config(pretrained: Pretrained, settings: dict[str, Any] | None = None) -> EvalConfig:
    """The `eval` section of the run that trained the model (the defaults, for an exported folder) under `settings`."""
    own = pretrained.run.eval if pretrained.run else EvalConfig()
    return validate(own.model_dump() | (settings or {}), EvalConfig, "eval")


def _print_table(evaluation: Evaluation, model: Path, shards: Paths) -> None:
    table = Table(title=f"{model} on {shards}", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in evaluation.scores.items():
        table.add_row(name, show_score(name, value))
    Console().print(table)


def _write_scores(
    path: Path, evaluation: Evaluation, pretrained: Pretrained, shards: Paths, config: EvalConfig
) -> None:
    record = {
        "scores": evaluation.scores,
        "data": shards if isinstance(shards, str) else " ".join(shards),
        "model": str(pretrained.path),
        "samples_trained_on": pretrained.samples,
        "tokenizer_sha256": pretrained.tokenizer.fingerprint,
        "settings": config.model_dump(mode="json"),
        "environment": {
            "mmscale": mmscale.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "ranks": rank_and_world_size()[1],
            "device": str(pretrained.model.device),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
