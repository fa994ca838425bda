"""Discrete prompts: trigger tokens before class names, searched by gradient (AutoPrompt,
https://arxiv.org/abs/2010.15980; the step is HotFlip's, https://arxiv.org/abs/1712.06751)."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.prompts.classes import Classes
from mmscale.adapt.prompts.metrics import balanced_log_likelihood, describe, merit
from mmscale.adapt.prompts.pictures import Pictures, encode_split, encode_splits
from mmscale.adapt.prompts.scorers import ContrastiveScorer
from mmscale.adapt.prompts.shots import draw_shots, encode_shots
from mmscale.adapt.tuning import open_split
from mmscale.data.tokenizer import Tokenizer
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.zeroshot import read_templates
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.pretrained import Pretrained

RESTARTS = 3  # from tokens drawn at random; the best is chosen by the dev split


@dataclass
class Found:
    """Trigger tokens, the loss on the pictures they were searched on, and the losses on the way."""

    token_ids: list[int]
    loss: float
    history: list[float]


class TriggerSearch:
    """Searches the tokens of [start] [triggers] class name [end] that tell few labelled pictures apart.

    In each round one place is flipped. The change of the loss, to first order, is the gradient at this place times the
    difference of the token embeddings; the candidates that promise most are tried, and the best stays if it is better.

    Args:
        words: of the classes.
        pictures: to tell apart.
        num_triggers, candidates: places, and tokens that are tried in a round.
    """

    def __init__(
        self,
        model: MMScaleModel,
        tokenizer: Tokenizer,
        words: list[str],
        pictures: Pictures,
        num_triggers: int,
        candidates: int,
    ):
        self.model, self.num_triggers, self.candidates = model, num_triggers, candidates
        device = model_device(model)
        self.image_embeds, self.targets = pictures.image_embeds.to(device), pictures.targets.to(device)
        marks = (tokenizer.start_id, tokenizer.end_id)
        context_length = model.config.text_config.context_length
        names = [tokenizer.encode(word, context_length - num_triggers)[1:-1] for word in words]
        rows = [[marks[0], *[tokenizer.pad_id] * num_triggers, *ids, marks[1]] for ids in names]
        longest = max(map(len, rows))
        self.input_ids = torch.tensor([row + [tokenizer.pad_id] * (longest - len(row)) for row in rows], device=device)
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        readable = [ids for ids in range(tokenizer.vocab_size) if tokenizer.decode([ids]).strip()]
        self.allowed = torch.tensor(readable, device=device)

    def run(self, rounds: int, seed: int, start: list[int]) -> Found:
        """Flips one place after the other, in an order drawn from `seed`, from the tokens `start` on."""
        draw = torch.Generator().manual_seed(seed)
        current, loss = start, self._loss(start)
        history = [loss]
        for _ in range(rounds):
            place = int(torch.randint(self.num_triggers, (), generator=draw))
            best, trial = min((self._loss(trial), trial) for trial in self._flips(current, place))
            if best < loss:
                loss, current = best, trial
            history.append(loss)
        return Found(current, loss, history)

    @torch.no_grad()
    def scores(self, triggers: list[int], image_embeds: Tensor) -> Tensor:
        """Log scores [pictures, classes] with these tokens, on the CPU."""
        vectors = self.model.text.tokens(torch.tensor(triggers, device=self.input_ids.device))
        return self._scores(vectors, image_embeds.to(vectors.device)).cpu()

    def _loss(self, triggers: list[int]) -> float:
        return -balanced_log_likelihood(self.scores(triggers, self.image_embeds), self.targets.cpu())

    def _scores(self, vectors: Tensor, image_embeds: Tensor) -> Tensor:
        """Log scores [pictures, classes] with the embeddings `vectors` [triggers, width] in the triggers' places."""
        context = vectors.expand(len(self.input_ids), -1, -1)
        class_embeds = F.normalize(self.model.text(self.input_ids, self.lengths, context=context)[0], dim=-1)
        return image_embeds @ class_embeds.T * self.model.logit_scale()[0].detach()

    def _flips(self, current: list[int], place: int) -> Iterator[list[int]]:
        table = self.model.text.tokens.weight
        vectors = table[current].detach().requires_grad_()
        with torch.enable_grad():
            scores = self._scores(vectors, self.image_embeds)
            loss = F.cross_entropy(scores, self.targets, 1.0 / torch.bincount(self.targets, minlength=scores.shape[1]))
            (gradient,) = torch.autograd.grad(loss, vectors)
        promise = -(table[self.allowed].detach() @ gradient[place])
        for token in self.allowed[promise.topk(min(self.candidates, len(self.allowed))).indices].tolist():
            yield [*current[:place], token, *current[place + 1 :]]


def find_triggers(config: AdaptConfig, base: Pretrained, classes: Classes) -> dict[str, Any]:
    """The report of kind `triggers`: the best of a few searches, by the dev split, beside the templates by hand."""
    settings, model, tokenizer = config.adapt.prompts, base.model, base.tokenizer
    if settings.shots is None:
        split = open_split(config, model, tokenizer, config.data.train, settings.sample)
        learn = encode_split(model, split, classes, False, "data.train")
    else:
        shots = draw_shots(config, tokenizer, classes, base.image_size, base.context_length)
        learn = encode_shots(model, shots, classes)
    splits = {"learn": learn, **encode_splits(config, base, classes, False)}
    search = TriggerSearch(model, tokenizer, classes.first_words, learn, settings.triggers, settings.candidates)
    draw, dev = random.Random(config.run.seed), splits["dev"]
    found = []
    for _ in range(RESTARTS):
        start = draw.choices(search.allowed.tolist(), k=settings.triggers)
        outcome = search.run(settings.rounds, draw.randrange(2**31), start)
        found.append((merit(search.scores(outcome.token_ids, dev.image_embeds), dev.targets), outcome))
    outcome = max(found, key=lambda item: item[0])[1]
    scorer, hand = ContrastiveScorer(model, tokenizer), read_templates(settings.templates)
    scores = {}
    for name, pictures in splits.items():
        by_hand = scorer(pictures, classes.first_words, hand)
        scores[f"{name}, by hand"] = describe(by_hand, pictures.targets)
        ours = search.scores(outcome.token_ids, pictures.image_embeds)
        scores[f"{name}, triggers"] = describe(ours, pictures.targets)
    return {
        "scored_on": ", ".join(splits),
        "scores": scores,
        "triggers": [tokenizer.piece(number) for number in outcome.token_ids],
        "text": tokenizer.decode(outcome.token_ids),
        "losses": outcome.history,
    }
