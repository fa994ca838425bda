"""Zero-shot classification: the class whose name, put into sentences, lies nearest to the picture.

The class embedding is the mean of the normalised embeddings of all templates, normalised again (the ensembling of CLIP,
Radford et al. 2021, section 3.1.4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmscale.config import EvalConfig
from mmscale.data.loader import EvalBatch
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.encoding import encode_shared_texts
from mmscale.evaluate.ranks import gather_in_order, gather_lists
from mmscale.model.modeling_mmscale import MMScaleModel

DEFAULT_TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}")


class ZeroShot:
    """The task in an evaluation: collects the pictures that have a class, then classifies them.

    After `finish`, `classification` holds the outcome and `positions` and `keys` say whose it is.
    """

    def __init__(self, model: MMScaleModel, tokenizer: Tokenizer, config: EvalConfig):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, config.batch
        self.names = read_lines(config.classnames, "class names") if config.classnames else None
        self.templates = read_templates(config.templates)
        prompts = model.config.class_prompts if config.templates is None else None
        self.learned = prompts["names"] if prompts else None  # a tuned model knows these classes better than templates
        self.positions: list[int] = []
        self.keys: list[str] = []
        self.classification: Classification | None = None
        self._records: list[dict] = []
        self._embeds: list[Tensor] = []

    def add(self, batch: EvalBatch, pixel_values: Tensor, image_embeds: Tensor, image_tokens: Tensor) -> None:
        """Takes the samples of one batch that have a class; `image_embeds` is `[batch, dim]`."""
        rows = [row for row in batch.valid.nonzero().flatten().tolist() if has_class(batch.records[row])]
        self.positions += batch.positions[rows].tolist()
        self.keys += [batch.keys[row] for row in rows]
        self._records += [batch.records[row] for row in rows]
        self._embeds.append(image_embeds[rows])

    def finish(self) -> dict[str, float]:
        """The scores over all ranks; empty when no sample has a class. Collective."""
        names = self.names or sorted(
            set(gather_lists([name for record in self._records if (name := class_name(record))]))
        )
        number = {name: index for index, name in enumerate(names)}
        targets = [target_class(record, number) for record in self._records]
        if not gather_lists(targets):
            return {}
        if self.learned and set(names) <= set(self.learned):
            ranked = classify_learned(self.model, torch.cat(self._embeds), [self.learned.index(name) for name in names])
        else:
            class_embeds = class_embeddings(self.model, self.tokenizer, names, self.templates, self.batch_size)
            ranked = classify(torch.cat(self._embeds), class_embeds)
        self.positions, (self.keys, targets, ranked) = gather_in_order(self.positions, self.keys, targets, ranked)
        self.classification = Classification(names, np.array(targets), ranked.cpu().numpy())
        return self.classification.scores()


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError when there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the {what} cannot be read: {error}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path}: no {what} in this file; it takes one a line")
    return lines


def read_templates(templates: str | Sequence[str] | None) -> list[str]:
    """Prompt templates, given as a file with one a line or as the sentences themselves; `{}` stands for the name.

    The list of CLIP's 80 ImageNet templates is accepted as it goes around: also with quotes and a trailing comma
    on each line.
    """
    if templates is None:
        return list(DEFAULT_TEMPLATES)
    if isinstance(templates, str):
        where = templates
        templates = [line.rstrip(",").strip("'\"") for line in read_lines(templates, "templates")]
    else:
        where = "eval.templates"
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"{where}: the template `{template}` needs exactly one `{{}}`, where the class name goes")
    return list(templates)


def class_embeddings(
    model: MMScaleModel, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str], batch_size: int
) -> Tensor:
    """One embedding per class, `[classes, dim]`, L2-normalised. Collective: the prompts are shared among the ranks."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embeds = encode_shared_texts(model, tokenizer, prompts, batch_size)
    return F.normalize(embeds.view(len(names), len(templates), -1).mean(dim=1), dim=-1)


@dataclass
class Classification:
    """What zero-shot classification found.

    Attributes:
        names: the classes.
        targets: `[samples]`, index of the right class.
        ranked: `[samples, min(5, classes)]`, the best classes, best first.
    """

    names: list[str]
    targets: np.ndarray
    ranked: np.ndarray

    def scores(self) -> dict[str, float]:
        """`zeroshot_top1`, `zeroshot_top5` (with more than five classes), and the mean of the classes' top-1."""
        hits = self.ranked == self.targets[:, None]
        scores = {"zeroshot_top1": float(hits[:, 0].mean())}
        if len(self.names) > 5:
            scores["zeroshot_top5"] = float(hits.any(axis=1).mean())
        present = np.unique(self.targets)
        scores["zeroshot_mean_per_class"] = float(np.mean([hits[self.targets == c, 0].mean() for c in present]))
        return scores

    def confusion(self) -> np.ndarray:
        """`[classes, classes]` counts: rows are the right class, columns the predicted one."""
        matrix = np.zeros((len(self.names), len(self.names)), dtype=np.int64)
        np.add.at(matrix, (self.targets, self.ranked[:, 0]), 1)
        return matrix


def classify(image_embeds: Tensor, class_embeds: Tensor, block: int = 8192) -> Tensor:
    """The best five classes (fewer when there are fewer), `[images, <=5]` int64, best first."""
    best = min(5, len(class_embeds))
    ranked = [torch.zeros(0, best, dtype=torch.long, device=image_embeds.device)]
    for start in range(0, len(image_embeds), block):
        ranked.append((image_embeds[start : start + block] @ class_embeds.T).topk(best, dim=1).indices)
    return torch.cat(ranked)


@torch.no_grad()
def classify_learned(model: MMScaleModel, image_embeds: Tensor, classes: list[int], block: int = 256) -> Tensor:
    """As `classify`, by the model's own class prompts, among the classes with these numbers."""
    best = min(5, len(classes))
    ranked = [torch.zeros(0, best, dtype=torch.long, device=image_embeds.device)]
    for part in image_embeds.split(block):
        ranked.append(model.class_logits(part)[:, classes].topk(best, dim=1).indices)
    return torch.cat(ranked)


def class_name(record: dict) -> str | None:
    """The class in a sample's JSON (`class_name`); None when it has none."""
    return str(record["class_name"]) if record.get("class_name") is not None else None


def has_class(record: dict) -> bool:
    """Whether a sample's JSON says its class, by name or as an index into a list of names."""
    return record.get("class_name") is not None or record.get("class_index") is not None


def target_class(record: dict, number: dict[str, int]) -> int:
    """The index of a sample's class, by `class_name`, else `class_index`.

    Args:
        number: the index of each class name.

    Raises:
        UserError: the sample is of a class that is not among the names.
    """
    name, index = class_name(record), record.get("class_index")
    if name is not None:
        if name not in number:
            raise UserError(f"a sample is of class `{name}`, which is not among the {len(number)} class names given")
        return number[name]
    if not isinstance(index, int) or not 0 <= index < len(number):
        raise UserError(f"a sample's `class_index` is {index!r}, but there are {len(number)} class names")
    return index
