"""Heads that predict an answer of a sample: one class, several, or a number."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn import metrics
from torch import Tensor
from torch.nn import functional as F

from mmscale.adapt.config import HeadTask
from mmscale.adapt.labels import Label
from mmscale.adapt.objective import Encoded, masked_sum
from mmscale.config import HeadConfig
from mmscale.data.batches import LabelledBatch
from mmscale.data.loader import EvalSet
from mmscale.errors import UserError
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.ranks import gather_in_order
from mmscale.model.modeling_mmscale import MMScaleModel


@dataclass
class Outcome:
    """What a head said about a split. keys: [samples]; targets and scores: [samples, outputs] or [samples]."""

    keys: list[str]
    targets: np.ndarray
    scores: np.ndarray


class Prediction:
    """A task whose head is `model.heads[name]`. After `evaluate`, `outcome` holds what it said."""

    def __init__(self, name: str, task: HeadTask, head: HeadConfig, class_weights: Sequence[float] | None = None):
        self.name, self.weight, self.head = name, task.weight, head
        self.label = Label(task.label, f"adapt.heads.{name}.label")
        self.outcome: Outcome | None = None
        self._source = task.source
        self._number = {label: number for number, label in enumerate(head.labels)}
        self._class_weights = torch.tensor(class_weights) if class_weights is not None else None

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        targets, known = self._targets(batch.records)
        if self._source is not None:
            known &= torch.tensor(batch.sources) == self._source
        known &= batch.valid
        weights = known.float()
        if self._class_weights is not None and self.head.kind == "classification":
            weights *= self._class_weights[targets]
        return {"targets": targets, "weights": weights, "count": weights.sum()}

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        scores = head_scores(model, self.name, encoded).float()
        targets, weights = inputs["targets"], inputs["weights"]
        if self.head.kind == "classification":
            terms = F.cross_entropy(scores, targets, reduction="none")
        elif self.head.kind == "multilabel":
            pos_weight = self._class_weights.to(scores.device) if self._class_weights is not None else None
            terms = F.binary_cross_entropy_with_logits(scores, targets, reduction="none", pos_weight=pos_weight).mean(1)
        else:
            terms = (scores[:, 0] - targets).square()
        return masked_sum(terms * weights, weights > 0)

    @torch.no_grad()
    def evaluate(self, model: MMScaleModel, split: EvalSet) -> dict[str, float]:
        positions, keys, targets, scores = [], [], [], []
        device = model_device(model)
        for batch in split:
            encoded = Encoded.of(model, batch)
            found, known = self._targets(batch.records)
            rows = (known & batch.valid).nonzero().flatten()
            positions += batch.positions[rows].tolist()
            keys += [batch.keys[row] for row in rows.tolist()]
            targets.append(found[rows].to(device))
            scores.append(head_scores(model, self.name, encoded).float()[rows.to(device)])
        _, (keys, targets, scores) = gather_in_order(positions, keys, torch.cat(targets), torch.cat(scores))
        if not keys:
            raise UserError(f"adapt.heads.{self.name}.label: no sample of the split has this answer")
        self.outcome = Outcome(keys, targets.cpu().numpy(), scores.cpu().numpy())
        return {f"{self.name}_{score}": value for score, value in self._metrics(self.outcome).items()}

    def _targets(self, records: list[dict]) -> tuple[Tensor, Tensor]:
        """Targets [batch] or [batch, classes], and bool [batch]: whether a sample has one."""
        if self.head.kind == "classification":
            numbers = [self._number.get(self.label.one(record), -1) for record in records]
            targets = torch.tensor(numbers)
            return targets.clamp(min=0), targets >= 0
        if self.head.kind == "multilabel":
            answers = [self.label.several(record) for record in records]
            targets = torch.zeros(len(records), len(self._number))
            for row, names in enumerate(answers):
                targets[row, [self._number[name] for name in names or () if name in self._number]] = 1.0
            return targets, torch.tensor([names is not None for names in answers])
        values = [self.label.number(record) for record in records]
        targets = torch.tensor([0.0 if value is None else (value - self.head.mean) / self.head.std for value in values])
        return targets, torch.tensor([value is not None for value in values])

    def _metrics(self, outcome: Outcome) -> dict[str, float]:
        targets, scores = outcome.targets, outcome.scores
        if self.head.kind == "classification":
            predicted = scores.argmax(1)
            return {
                "accuracy": float(metrics.accuracy_score(targets, predicted)),
                "macro_f1": float(metrics.f1_score(targets, predicted, average="macro", zero_division=0)),
            }
        if self.head.kind == "multilabel":
            present = targets.any(0)
            return {
                "mean_ap": float(metrics.average_precision_score(targets[:, present], scores[:, present])),
                "macro_f1": float(metrics.f1_score(targets, scores > 0, average="macro", zero_division=0)),
                "exact": float((targets == (scores > 0)).all(1).mean()),
            }
        targets, predicted = (values * self.head.std for values in (targets, scores[:, 0]))
        return {
            "r2": float(metrics.r2_score(targets, predicted)),
            "mean_absolute_error": float(metrics.mean_absolute_error(targets, predicted)),
        }


def head_scores(model: MMScaleModel, name: str, encoded: Encoded) -> Tensor:
    """Scores [batch, outputs] of one head; only what it looks at is computed."""
    head = model.heads[name]
    if head.uses_decoder:
        ids = encoded.input_ids if head.likelihood is not None else None
        state, likelihood = model.fuse(encoded.text_tokens, encoded.lengths, encoded.image_tokens, ids)
        return head(fused=state, likelihood=likelihood)
    image = {"image_embeds": encoded.image_embeds, "image_tokens": encoded.image_tokens} if head.uses_image else {}
    text = {"text_embeds": encoded.text_embeds} if head.uses_text else {}
    return head(**image, **text)
