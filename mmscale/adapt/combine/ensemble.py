"""Method `ensemble`: the logits of several models, added up.

The logit of a picture and a text is sum_m w_m s_m cos_m(picture, text), with the logit scales s_m, and weights w_m that
are chosen on the dev split as in https://doi.org/10.1145/1015330.1015432 (Caruana et al. 2004): models are added one by
one, with repetition, each time the one that helps most. Such a sum is the inner product of the models' embeddings side
by side, each times the root of its share, so an ensemble is ranked as one model is. The models may have any sizes and
tokenizers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmscale.adapt.combine.sources import (
    check_alone,
    load_models,
    mean_score,
    open_split,
    print_scores,
    write_report,
)
from mmscale.adapt.config import AdaptConfig
from mmscale.config import Paths
from mmscale.errors import UserError
from mmscale.evaluate.retrieval import distinct_pairs, retrieval_scores
from mmscale.evaluate.zeroshot import (
    Classification,
    class_embeddings,
    class_name,
    classify,
    has_class,
    read_lines,
    read_templates,
    target_class,
)
from mmscale.pretrained import Pretrained


@dataclass
class Embedded:
    """A split through one model.

    Attributes:
        images, texts: [samples, dim] of unit length, of each picture and its first caption.
        classes: [classes, dim] of unit length; None when no sample has a class.
        scale: the model's logit scale.
    """

    images: Tensor
    texts: Tensor
    classes: Tensor | None
    scale: float


@dataclass
class Truth:
    """What is right about a split, for every model the same.

    Attributes:
        pairs: rows that retrieval is scored on.
        names: of the classes. rows, targets: the rows that have one, and which.
    """

    pairs: list[int]
    names: list[str]
    rows: list[int]
    targets: list[int]


def fit_ensemble(config: AdaptConfig) -> int:
    """Chooses the weights on `data.val` and writes them, with the scores on `data.test`, to `run.dir/report.json`."""
    check_alone("ensemble")
    settings = config.adapt.ensemble
    models = load_models(settings.models, "adapt.ensemble.models")
    dev, truth = embed_split(config, models, config.data.val, "data.val")

    def score(weights: Sequence[float]) -> float:
        return mean_score(ensemble_scores(dev, weights, truth), settings.score, "adapt.ensemble.score")

    weights = choose_weights(len(models), score, settings.rounds)
    report = {
        "score": settings.score,
        "weights": dict(zip(settings.models, weights, strict=True)),
        "dev": _side_by_side(settings.models, dev, weights, truth),
    }
    for name, weight in report["weights"].items():
        print(f"{name}: weight {weight:.2f}", flush=True)
    if config.data.test is not None:
        test, truth = embed_split(config, models, config.data.test, "data.test")
        report["test"] = _side_by_side(settings.models, test, weights, truth)
    print_scores(
        f"each model, and the ensemble, on data.{'test' if 'test' in report else 'val'}",
        report.get("test", report["dev"]),
    )
    write_report(config.run.dir, report)
    return 0


def _side_by_side(
    names: Sequence[str], models: Sequence[Embedded], weights: Sequence[float], truth: Truth
) -> dict[str, dict[str, float]]:
    scores = {name: ensemble_scores([model], [1.0], truth) for name, model in zip(names, models, strict=True)}
    return scores | {"ensemble": ensemble_scores(models, weights, truth)}


def choose_weights(count: int, score: Callable[[Sequence[float]], float], rounds: int) -> list[float]:
    """The weights, which sum to 1, of the best of the ensembles that are met on the way.

    Every round adds the model with which the score is largest, of equals the one that was added least often.
    """
    added: Counter[int] = Counter()
    best, best_score = [], -float("inf")
    for _ in range(rounds):
        candidates = []
        for number in range(count):
            tried = added + Counter([number])
            weights = [tried[index] / tried.total() for index in range(count)]
            candidates.append((score(weights), -added[number], -number, weights))
        value, _, number, weights = max(candidates)
        added[-number] += 1
        if value > best_score:
            best, best_score = weights, value
    return best


def ensemble_scores(models: Sequence[Embedded], weights: Sequence[float], truth: Truth) -> dict[str, float]:
    """Retrieval and zero-shot scores, named as those of `mmscale eval`."""
    shares = [weight * model.scale for weight, model in zip(weights, models, strict=True)]
    roots = [(share / sum(shares)) ** 0.5 for share in shares]

    def together(part: str) -> Tensor:
        return torch.cat([root * getattr(model, part) for root, model in zip(roots, models, strict=True)], dim=1)

    images, texts = together("images"), together("texts")
    found = retrieval_scores(images[truth.pairs], texts[truth.pairs], torch.arange(len(truth.pairs)))
    scores = {f"retrieval_{name}": value for name, value in found.items()}
    if truth.rows:
        ranked = classify(images[truth.rows], together("classes")).numpy()
        scores |= Classification(truth.names, np.array(truth.targets), ranked).scores()
    return scores


@torch.no_grad()
def embed_split(
    config: AdaptConfig, models: Sequence[Pretrained], shards: Paths | None, key: str
) -> tuple[list[Embedded], Truth]:
    """A split through every model, and what is right about it. Raises UserError."""
    own_names = read_lines(config.eval.classnames, "class names") if config.eval.classnames else None
    templates = read_templates(config.eval.templates)
    embedded, truth = [], None
    for model in models:
        images, texts, captions, records = [], [], [], []
        for batch in open_split(config, model, shards, key):
            rows = batch.valid.nonzero().flatten().tolist()
            images.append(model.model.get_image_features(batch.pixel_values)[rows])
            texts.append(model.model.encode_text(batch.input_ids, lengths=batch.lengths.clamp(min=1))[0][rows])
            captions += [batch.captions[row] for row in rows]
            records += [batch.records[row] for row in rows]
        if not captions:
            raise UserError(f"{key}: holds no good sample")
        if truth is None:
            truth = _truth(captions, records, own_names, config.eval.distinct_pairs)
        classes = None
        if truth.rows:
            classes = class_embeddings(model.model, model.tokenizer, truth.names, templates, config.eval.batch)
        scale = float(model.model.logit_scale()[0])
        embedded.append(Embedded(torch.cat(images).float(), torch.cat(texts).float(), classes, scale))
    return embedded, truth


def _truth(captions: list[list[str]], records: list[dict], own_names: list[str] | None, pairs: int | None) -> Truth:
    names = own_names or sorted({name for record in records if (name := class_name(record))})
    number = {name: index for index, name in enumerate(names)}
    rows = [row for row, record in enumerate(records) if has_class(record)]
    taken = distinct_pairs(captions, pairs) if pairs else list(range(len(captions)))
    return Truth(taken, names, rows, [target_class(records[row], number) for row in rows])
