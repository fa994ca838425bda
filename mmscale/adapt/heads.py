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
    found = find_answers(config)
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


class Answers:
    """What one head's task finds in the training data, record by record, and the head's settings that follow."""

    def __init__(self, name: str, task: HeadTask):
        self._task, self._key = task, f"adapt.heads.{name}"
        self._counts: Counter[str] = Counter()
        self._numbers: list[float] = []
        self._num_samples = 0
        self._label = None
        if task.kind == "matching":
            if self._fusion in ("image", "text"):
                raise UserError(f"{self._key}.fusion: `{self._fusion}` sees only one of the two that are to match")
        elif task.label is None:
            raise UserError(
                f"{self._key}.label: is required: where the answer is in a sample's JSON, such as class_name"
            )
        else:
            self._label = Label(task.label, f"{self._key}.label")

    def add(self, source: int, record: dict) -> None:
        if self._label is None or self._task.source not in (None, source):
            return
        if self._task.kind == "regression":
            if (number := self._label.number(record)) is not None:
                self._numbers.append(number)
            return
        several = self._task.kind == "multilabel"
        answer = self._label.several(record) if several else self._label.one(record)
        if answer is not None:
            self._counts.update(answer if several else [answer])
            self._num_samples += 1

    def head(self) -> tuple[HeadConfig, list[float] | None]:
        """The head's settings with the classes, or the mean and spread, that were found; and the classes' weights.

        Weights are those of scikit-learn's `balanced`: samples / (classes * samples of the class); for several classes
        a sample, samples without the class / samples with it. Raises UserError when the answers allow no such head.
        """
        task, shared = self._task, {"kind": self._task.kind, "fusion": self._fusion, "hidden": self._task.hidden}
        if task.kind == "matching":
            return HeadConfig(**shared, likelihood=self._fusion == "cross_attention"), None
        if task.kind == "regression":
            if not self._numbers:
                raise UserError(f"{self._key}.label: `{task.label}` gives no number for any training sample")
            std = float(np.std(self._numbers)) or 1.0
            return HeadConfig(**shared, mean=float(np.mean(self._numbers)), std=std), None
        classes = self._classes()
        return HeadConfig(**shared, labels=classes), self._weights(classes)

    @property
    def _fusion(self) -> str:
        chosen = self._task.kind != "matching" or "fusion" in self._task.model_fields_set
        return self._task.fusion if chosen else "cross_attention"

    def _classes(self) -> list[str]:
        task, found = self._task, sorted(self._counts)
        classes = task.classes or found
        if missing := [name for name in classes if not self._counts[name]]:
            raise UserError(
                f"{self._key}.classes: no training sample is a `{missing[0]}`; there are {', '.join(found)}"
            )
        if len(classes) < (1 if task.kind == "multilabel" else 2):
            raise UserError(f"{self._key}.label: `{task.label}` gives {len(classes)} class(es) in the training data")
        if len(classes) > MAX_CLASSES:
            raise UserError(
                f"{self._key}.label: `{task.label}` gives {len(classes):,} classes; is it a name or a number?"
            )
        return classes

    def _weights(self, classes: list[str]) -> list[float] | None:
        if self._task.class_weights == "none":
            return None
        counts = [self._counts[name] for name in classes]
        if self._task.kind == "multilabel":
            return [(self._num_samples - count) / count or 1.0 for count in counts]
        return [sum(counts) / (len(classes) * count) for count in counts]


def find_answers(config: AdaptConfig) -> dict[str, tuple[HeadConfig, list[float] | None]]:
    """`Answers.head` of every task of `adapt.heads`, from one pass over the training data."""
    answers = {name: Answers(name, task) for name, task in config.adapt.heads.items()}
    if any(task.kind != "matching" for task in config.adapt.heads.values()):
        for source, record in train_records(config.data):
            for own in answers.values():
                own.add(source, record)
    return {name: own.head() for name, own in answers.items()}
