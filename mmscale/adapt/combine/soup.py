"""Method `soup`: the mean of the weights of models tuned from one pretrained model, which costs what one of them costs.

The recipes are those of https://arxiv.org/abs/2203.05482 (algorithm 1): `uniform` takes all models, `greedy` goes
through them from the best to the worst, by their scores on the dev split, and keeps each that does not lower the score
of the mean. The greedy soup is then never worse than the best model, on the dev split; the report says how it is on
`data.test`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmscale.adapt.combine.sources import (
    check_alone,
    check_empty,
    evaluate,
    load_models,
    mean_score,
    print_scores,
    write_model,
    write_report,
)
from mmscale.adapt.config import AdaptConfig
from mmscale.errors import UserError
from mmscale.pretrained import Pretrained, load_pretrained

Weights = dict[str, Tensor]


def cook_soup(config: AdaptConfig) -> int:
    """Writes the soup as a checkpoint in `run.dir`, loads it again, and reports it beside its models."""
    check_alone("soup")
    check_empty(config)
    settings = config.adapt.soup
    models = load_models(settings.models, "adapt.soup.models")
    check_same_sizes(models)
    weights = [{name: tensor.clone() for name, tensor in model.model.state_dict().items()} for model in models]
    pot = models[0]  # every mean is put into this one to be scored

    def score(mean: Weights) -> float:
        pot.model.load_state_dict(mean)
        scores = evaluate(config, pot, config.data.val, "data.val")
        return mean_score(scores, settings.score, "adapt.soup.score")

    singles = [score(own) for own in weights]
    for name, value in zip(settings.models, singles, strict=True):
        print(f"{name}: {value:.4f} on data.val", flush=True)
    if settings.recipe == "greedy":
        chosen, value = greedy_recipe(weights, singles, score)
    else:
        chosen, value = list(range(len(weights))), score(mean_weights(weights))
    print(f"{settings.recipe} soup of {len(chosen)}: {value:.4f} on data.val", flush=True)
    names = [settings.models[number] for number in chosen]
    soup = mean_weights([weights[number] for number in chosen])
    write_model(config, models[chosen[0]], soup, {"soup": names})
    written = load_pretrained(config.run.dir, device="cpu")
    if any(not torch.equal(tensor, soup[name]) for name, tensor in written.model.state_dict().items()):
        raise UserError(f"run.dir: {config.run.dir}: what was written there does not read back as it was")
    report = {
        "recipe": settings.recipe,
        "models": names,
        "score": settings.score,
        "dev": dict(zip(settings.models, singles, strict=True)) | {"soup": value},
    }
    if config.data.test is not None:
        report["test"] = {}
        for name, own in zip(settings.models, weights, strict=True):
            pot.model.load_state_dict(own)
            report["test"][name] = evaluate(config, pot, config.data.test, "data.test")
        report["test"]["soup"] = evaluate(config, written, config.data.test, "data.test")
        best = settings.models[max(range(len(singles)), key=singles.__getitem__)]
        columns = {f"{best} (best on data.val)": report["test"][best], "soup": report["test"]["soup"]}
        print_scores(f"the {settings.recipe} soup in {config.run.dir}, on data.test", columns)
    write_report(config.run.dir, report)
    return 0


def greedy_recipe(
    models: Sequence[Weights], singles: Sequence[float], score: Callable[[Weights], float]
) -> tuple[list[int], float]:
    """Which models the soup is made of, the best first, and its score.

    Args:
        singles: the score of each model alone.
        score: of weights; larger is better.
    """
    order = sorted(range(len(models)), key=lambda number: -singles[number])
    chosen, best = order[:1], singles[order[0]]
    for number in order[1:]:
        value = score(mean_weights([models[index] for index in [*chosen, number]]))
        if value >= best:
            chosen, best = [*chosen, number], value
    return chosen, best


def mean_weights(models: Sequence[Weights]) -> Weights:
    """The mean of every tensor, summed in fp64 so that the order does not matter, in the first model's dtype."""
    return {
        name: (sum(weights[name].double() for weights in models) / len(models)).to(tensor.dtype)
        for name, tensor in models[0].items()
    }


def check_same_sizes(models: Sequence[Pretrained]) -> None:
    """Raises UserError for a model that has other tensors, or another tokenizer, than the first."""
    first = models[0]
    shapes = {name: tensor.shape for name, tensor in first.model.state_dict().items()}
    for model in models[1:]:
        found = {name: tensor.shape for name, tensor in model.model.state_dict().items()}
        if odd := next((name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)), None):
            raise UserError(
                f"adapt.soup.models: `{odd}` has other shapes in {model.path} and {first.path}; only models of the "
                "same sizes can be averaged"
            )
        if model.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise UserError(f"adapt.soup.models: {model.path} and {first.path} have different tokenizers")
