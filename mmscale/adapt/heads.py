"""Method `heads`: classification, regression and matching on top of a pretrained model, several at once if need be."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmscale.adapt.base import complete, load_base
from mmscale.adapt.config import AdaptConfig, HeadTask
from mmscale.adapt.labels import Label, check_splits, train_records
from mmscale.adapt.matching import Matching
from mmscale.adapt.predictions import Prediction
from mmscale.adapt.reporting import write_report
from mmscale.adapt.tuning import open_split, score, tune
from mmscale.config import HeadConfig
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.ranks import rank_and_world_size
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.pretrained import load_pretrained

MAX_CLASSES = 10_000


def tune_heads(config: AdaptConfig) -> int:
    """Trains the heads of `adapt.heads`, and reports on `data.test` with the weights that did best on `data.val`.

    `run.dir` holds what a training run leaves, and then `report.json` with the scores for each class and
    `confusion_NAME.png`. Returns the trainer's exit code. Raises UserError.
    """
    if not config.adapt.heads:
        raise UserError("adapt.heads: names no task; for example adapt.heads.shape: {kind: classification, label: ...}")
    check_splits(config.data)
    found = {name: _find_labels(name, task, config) for name, task in config.adapt.heads.items()}
    config = complete(config, load_base(config), heads={name: head for name, (head, _) in found.items()})

    def make_tasks(model: MMScaleModel, tokenizer: Tokenizer) -> Sequence[Prediction | Matching]:
        context_length = model.config.text_config.context_length
        return [
            Matching(name, task, tokenizer, context_length, config.run.seed)
            if task.kind == "matching"
            else Prediction(name, task, *found[name])
            for name, task in config.adapt.heads.items()
        ]

    code = tune(config, make_tasks)
    if code == 0 and config.data.test is not None:
        chosen = load_pretrained(config.run.dir)
        tasks = make_tasks(chosen.model, chosen.tokenizer)
        scores = score(chosen.model, tasks, open_split(config, chosen.model, chosen.tokenizer, config.data.test))
        if rank_and_world_size()[0] == 0:
            write_report(Path(config.run.dir), chosen, scores, tasks)
    return code


def _find_labels(name: str, task: HeadTask, config: AdaptConfig) -> tuple[HeadConfig, list[float] | None]:
    """The head's settings with the classes, or the mean and spread, of the training data; and the classes' weights.

    Weights are those of scikit-learn's `balanced`: samples / (classes * samples of the class); for several classes a
    sample, samples without the class / samples with it.
    """
    key = f"adapt.heads.{name}"
    fusion = task.fusion
    if task.kind == "matching":
        fusion = fusion if "fusion" in task.model_fields_set else "cross_attention"
        if fusion in ("image", "text"):
            raise UserError(f"{key}.fusion: `{fusion}` sees only one of the two that are to match")
        likelihood = fusion == "cross_attention"
        return HeadConfig(kind=task.kind, fusion=fusion, hidden=task.hidden, likelihood=likelihood), None
    if task.label is None:
        raise UserError(f"{key}.label: is required: where the answer is in a sample's JSON, such as class_name")
    label = Label(task.label, f"{key}.label")
    own = (record for source, record in train_records(config.data) if task.source in (None, source))
    head = {"kind": task.kind, "fusion": fusion, "hidden": task.hidden}
    if task.kind == "regression":
        numbers = [value for record in own if (value := label.number(record)) is not None]
        if not numbers:
            raise UserError(f"{key}.label: `{task.label}` gives no number for any training sample")
        return HeadConfig(**head, mean=float(np.mean(numbers)), std=float(np.std(numbers)) or 1.0), None
    counts: Counter[str] = Counter()
    num_samples = 0
    for record in own:
        answer = label.several(record) if task.kind == "multilabel" else label.one(record)
        if answer is not None:
            counts.update(answer if isinstance(answer, list) else [answer])
            num_samples += 1
    classes = task.classes or sorted(counts)
    if missing := [name for name in classes if not counts[name]]:
        raise UserError(f"{key}.classes: no training sample is a `{missing[0]}`; there are {', '.join(sorted(counts))}")
    if len(classes) < (1 if task.kind == "multilabel" else 2):
        raise UserError(f"{key}.label: `{task.label}` gives {len(classes)} class(es) in the training data")
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{key}.label: `{task.label}` gives {len(classes):,} classes; is it a name or a number?")
    weights = None
    if task.class_weights == "balanced":
        if task.kind == "multilabel":
            weights = [(num_samples - counts[name]) / counts[name] or 1.0 for name in classes]
        else:
            total = sum(counts[name] for name in classes)
            weights = [total / (len(classes) * counts[name]) for name in classes]
    return HeadConfig(**head, labels=classes), weights
