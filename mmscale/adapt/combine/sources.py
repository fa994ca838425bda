"""What the methods on several models share: loading them, scoring them, and writing what came out."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmscale.adapt.base import complete
from mmscale.adapt.config import AdaptConfig
from mmscale.checkpoint import FOLDER, Fragment, commit, committed, folder_name, write_fragments
from mmscale.config import Config, HeadConfig, Paths
from mmscale.data.loader import EvalSet
from mmscale.errors import UserError
from mmscale.evaluate import splits
from mmscale.evaluate.evaluation_page import show_score
from mmscale.evaluate.run import run_evaluation
from mmscale.pretrained import Pretrained, load_pretrained


def load_models(names: Sequence[str], key: str) -> list[Pretrained]:
    """The models that a setting names, on the CPU. Raises UserError, also when there are fewer than two."""
    if len(names) < 2:
        raise UserError(f"{key}: names {len(names)} model(s); give at least two")
    return [load_pretrained(name, device="cpu") for name in names]


def check_alone(method: str) -> None:
    """Raises UserError under a launcher of several processes, which would all write the same files."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"adapt.method: `{method}` runs in one process; start it without a launcher")


def open_split(config: AdaptConfig, model: Pretrained, shards: Paths | None, key: str) -> EvalSet:
    """A split as this model reads it. Raises UserError when it is not set."""
    if shards is None:
        raise UserError(f"{key}: is required: shards to score on, which nothing was trained on")
    return splits.open_split(
        shards,
        model.model,
        model.tokenizer,
        config.data,
        batch_size=config.eval.batch,
        limit=config.eval.samples,
        ranks=splits.WHOLE,
    )


def evaluate(config: AdaptConfig, model: Pretrained, shards: Paths | None, key: str) -> dict[str, float]:
    """The scores of `mmscale eval` on a split, of the tasks in `eval.tasks`."""
    return run_evaluation(
        model.model, model.tokenizer, open_split(config, model, shards, key), config=config.eval
    ).scores


def mean_score(scores: Mapping[str, float], names: Sequence[str], key: str) -> float:
    """The mean of the named scores. Raises UserError for one that was not measured."""
    for name in names:
        if name not in scores or name.endswith("_rank"):
            known = ", ".join(found for found in scores if not found.endswith(("_rank", "_samples", "_pairs")))
            raise UserError(f"{key}: `{name}` is not among the scores where more is better: {known}")
    return sum(scores[name] for name in names) / len(names)


def write_model(config: AdaptConfig, like: Pretrained, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Path:
    """Writes weights as a checkpoint in `run.dir`, which is then a run like any other.

    Args:
        like: the model whose sizes, tokenizer and settings the weights belong to.
        tensors: all of its tensors by name.
        facts: for the manifest, beside the usual ones.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: `run.dir` holds a checkpoint already, or cannot be written.
    """
    check_empty(config)
    run, step = _run_settings(config, like), like.step or 0
    folder = Path(config.run.dir) / FOLDER / folder_name(step)
    fragments = [
        Fragment("param", name, tuple(tensor.shape), 0, tensor.numel(), tensor.detach().flatten())
        for name, tensor in tensors.items()
    ]
    nonce = uuid.uuid4().hex
    manifest = {
        "step": step,
        "samples": like.samples or 0,
        "tokenizer": like.tokenizer.fingerprint,
        "config": run.model_dump(mode="json"),
        **facts,
    }
    try:
        write_fragments(folder, 0, fragments, nonce)
        assert commit(folder, 1, nonce, manifest, tokenizer=Path(like.tokenizer.path))
    except OSError as error:
        raise UserError(f"run.dir: {config.run.dir}: cannot be written: {error.strerror}") from None
    return folder


def check_empty(config: AdaptConfig) -> None:
    """Raises UserError when `run.dir` holds a checkpoint."""
    if committed(Path(config.run.dir) / FOLDER):
        raise UserError(f"run.dir: {config.run.dir} holds a model already; give another folder, or remove it")


def _run_settings(config: AdaptConfig, like: Pretrained) -> Config:
    """The configuration that a checkpoint of these weights is read with: that of the model's own run, if it has one."""
    if like.run is not None:
        # The weights are those of the plain model: adapters have been added to what they adapt.
        model = like.run.model.model_copy(update={"lora": None})
        return like.run.model_copy(update={"run": config.run, "model": model})
    heads = {name: HeadConfig(**head) for name, head in like.model.config.heads.items()}
    raw = complete(config, like, heads).model_dump(mode="json", exclude={"adapt"})
    raw["data"].pop("test")
    raw["train"] = raw["train"] or {"samples": 1, "global_batch": 1}  # a run has to say; nothing was trained here
    return Config.model_validate(raw)


def write_report(folder: str | Path, report: dict[str, Any]) -> None:
    """`report.json` in the folder, which is made."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (Path(folder) / "report.json").write_text(text, encoding="utf-8")


def print_scores(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """A table of scores: one column a model."""
    table = Table(title=title, title_justify="left")
    table.add_column("score")
    for name in columns:
        table.add_column(name, justify="right")
    for score in next(iter(columns.values())):
        cells = [show_score(score, scores[score]) if score in scores else "" for scores in columns.values()]
        table.add_row(score, *cells)
    Console().print(table)
