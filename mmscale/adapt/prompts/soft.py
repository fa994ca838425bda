"""The tasks that train learned prompts, as `AdaptationObjective` takes them; the towers may stay as they are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.adapt.objective import Encoded, masked_sum, pad_ids
from mmscale.adapt.prompts.classes import Classes
from mmscale.adapt.prompts.metrics import describe
from mmscale.adapt.prompts.pictures import Pictures, encode_split
from mmscale.adapt.prompts.scorers import TEXTS, CaptionScorer, ContrastiveScorer
from mmscale.adapt.prompts.templates import SLOT
from mmscale.data.batches import LabelledBatch
from mmscale.data.loader import EvalSet
from mmscale.data.tokenizer import Tokenizer
from mmscale.evaluate.encoding import encode_shared_texts, model_device
from mmscale.evaluate.ranks import gather_in_order
from mmscale.model.layers import Packing
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.objectives.captioning import caption_loss, predicted_tokens


class _Classification(ABC):
    """Pictures of known classes; a subclass says how the model scores them.

    Args:
        embeds: image embeddings by a sample's key, where they are known and do not change; the image tower then rests.
    """

    name, weight = "classes", 1.0
    needs_tokens = False

    def __init__(self, classes: Classes, embeds: dict[str, Tensor] | None = None):
        self.classes, self.embeds = classes, embeds

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        targets = self.classes.targets(batch.records)
        known = (targets >= 0) & batch.valid
        inputs = {"targets": targets.clamp(min=0), "known": known, "count": known.sum()}
        return inputs | ({"embeds": torch.stack([self.embeds[key] for key in batch.keys])} if self.embeds else {})

    @torch.no_grad()
    def evaluate(self, model: MMScaleModel, split: EvalSet) -> dict[str, float]:
        pictures = encode_split(model, split, self.classes, self.needs_tokens, "adapt.prompts.label")
        found = describe(self.scores(model, pictures), pictures.targets)
        return {f"{self.name}_{score}": value for score, value in found.items()}

    @abstractmethod
    def scores(self, model: MMScaleModel, pictures: Pictures) -> Tensor:
        """Log scores [pictures, classes], on the CPU. Collective."""


class _ByEmbedding(_Classification):
    """Scored by the image embedding alone: `logits` makes [batch, classes] of unit embeddings [batch, embed_dim]."""

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        image_embeds = inputs["embeds"] if self.embeds else encoded.image_embeds
        terms = F.cross_entropy(self.logits(model, image_embeds), inputs["targets"], reduction="none")
        return masked_sum(terms, inputs["known"])

    @torch.no_grad()
    def scores(self, model: MMScaleModel, pictures: Pictures) -> Tensor:
        parts = pictures.image_embeds.to(model_device(model)).split(256)
        return torch.cat([self.logits(model, part).float() for part in parts]).cpu()

    @abstractmethod
    def logits(self, model: MMScaleModel, image_embeds: Tensor) -> Tensor: ...


class ContextTask(_ByEmbedding):
    """Context vectors before the class names (`model.class_prompts`)."""

    def logits(self, model: MMScaleModel, image_embeds: Tensor) -> Tensor:
        return model.class_logits(image_embeds)


class ImagePromptTask(_ByEmbedding):
    """Tokens beside the patches, against class names in fixed templates."""

    def __init__(self, classes: Classes, model: MMScaleModel, tokenizer: Tokenizer, templates: Sequence[str]):
        super().__init__(classes)
        words = classes.first_words
        scorer = ContrastiveScorer(model, tokenizer)
        self._class_embeds = scorer.class_embeds(words, templates)
        self._scale = float(model.logit_scale()[0].detach())

    def logits(self, model: MMScaleModel, image_embeds: Tensor) -> Tensor:
        return image_embeds @ self._class_embeds.to(image_embeds).T * self._scale


class PrefixTask(_Classification):
    """Keys and values before the text in the decoder, which learns to write a template with the class's word in it."""

    needs_tokens = True

    def __init__(self, classes: Classes, tokenizer: Tokenizer, template: str, context_length: int):
        super().__init__(classes)
        self.tokenizer, self.template = tokenizer, template
        words = classes.first_words
        self._sentences = [tokenizer.encode(template.replace(SLOT, word), context_length) for word in words]

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        inputs = super().prepare(batch)
        ids, lengths = pad_ids(
            [self._sentences[target] for target in inputs["targets"].tolist()], self.tokenizer.pad_id
        )
        count = ((lengths - 1) * inputs["known"]).sum()
        return {"input_ids": ids, "lengths": lengths, "known": inputs["known"], "count": count}

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        input_ids = inputs["input_ids"]
        predicted = predicted_tokens(inputs["lengths"], inputs["known"], input_ids.shape[1])
        _, states = model.text(input_ids[:, :-1])
        hidden = model.decoder(states, encoded.image_tokens)
        place = Packing.of(predicted)
        return caption_loss(model.decoder.head, place.pack(hidden), input_ids, place)

    def scores(self, model: MMScaleModel, pictures: Pictures) -> Tensor:
        return CaptionScorer(model, self.tokenizer)(pictures, self.classes.first_words, [self.template])


@dataclass
class Guide:
    """One guide: the text that asks, and the classes it asks for."""

    text: str
    classes: Classes


class GuideTask:
    """Image embeddings under several guides, each drawn to the word for what its guide asks about.

    The words of all guides compete: under "the colour" a red circle is to be near to `red` and away from `circle`.
    """

    name, weight = "guide", 1.0

    def __init__(
        self,
        guides: Sequence[Guide],
        model: MMScaleModel,
        tokenizer: Tokenizer,
        temperature: float | None = None,
    ):
        self.guides = list(guides)
        words = [word for guide in guides for word in guide.classes.first_words]
        with torch.no_grad():
            self._words = encode_shared_texts(model, tokenizer, words, TEXTS)
            self.embeds = encode_shared_texts(model, tokenizer, [guide.text for guide in guides], TEXTS)
            self._scale = 1 / temperature if temperature is not None else float(model.logit_scale()[0].detach())
        sizes = [len(guide.classes) for guide in guides]
        self._first = torch.tensor([sum(sizes[:number]) for number in range(len(sizes))])

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        targets = torch.stack([guide.classes.targets(batch.records) for guide in self.guides], dim=1)
        known = (targets >= 0) & batch.valid[:, None]
        return {"targets": targets.clamp(min=0) + self._first, "known": known, "count": known.sum()}

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        embeds = model.get_image_features(encoded.pixel_values, self.embeds[None].to(encoded.pixel_values.device))
        logits = (embeds @ self._words.to(embeds).T * self._scale).flatten(0, 1)
        terms = F.cross_entropy(logits, inputs["targets"].flatten(), reduction="none")
        return masked_sum(terms, inputs["known"].flatten())

    @torch.no_grad()
    def evaluate(self, model: MMScaleModel, split: EvalSet) -> dict[str, float]:
        """For each guide, how often the nearest of all words is the right one."""
        guided = encode_guided(model, split, self.guides, self.embeds)
        scores = {}
        for number, guide in enumerate(self.guides):
            known = guided.targets[:, number] >= 0
            nearest = (guided.embeds[known, number] @ self._words.cpu().T).argmax(1)
            right = nearest == guided.targets[known, number] + self._first[number]
            scores[f"{self.name}_accuracy {guide.text}"] = float(right.double().mean())
        return {f"{self.name}_accuracy": sum(scores.values()) / len(scores)} | scores

    def report(self, train: "Guided", test: "Guided") -> dict[str, dict[str, float]]:
        """What can be read from the embeddings of `test` under each guide and under none: for every guide's question,
        how often the nearest class mean, over `train`, is the right one. The last row is the most frequent class."""
        views = {"under no guide": (train.plain, test.plain)} | {
            f"under {guide.text}": (train.embeds[:, number], test.embeds[:, number])
            for number, guide in enumerate(self.guides)
        }
        questions = [(guide.text, train.targets[:, n], test.targets[:, n]) for n, guide in enumerate(self.guides)]
        scores = {
            row: {text: nearest_mean_accuracy(known, own, judged, targets) for text, own, targets in questions}
            for row, (known, judged) in views.items()
        }
        return scores | {"chance": {text: _largest_share(targets) for text, _, targets in questions}}


@dataclass
class Guided:
    """A split under every guide and under none.

    embeds: [pictures, guides, embed_dim]. plain: [pictures, embed_dim]. targets: [pictures, guides], -1 for none.
    """

    embeds: Tensor
    plain: Tensor
    targets: Tensor


@torch.no_grad()
def encode_guided(model: MMScaleModel, split: EvalSet, guides: Sequence[Guide], guide_embeds: Tensor) -> Guided:
    """Collective; pictures without any of the classes are left out."""
    device = model_device(model)
    positions, columns = [], ([], [], [])
    for batch in split:
        pixel_values = batch.pixel_values.to(device)
        targets = torch.stack([guide.classes.targets(batch.records) for guide in guides], dim=1)
        rows = ((targets >= 0).any(1) & batch.valid).nonzero().flatten()
        embeds = model.get_image_features(pixel_values, guide_embeds[None].to(device))
        plain = model.get_image_features(pixel_values)
        positions += batch.positions[rows].tolist()
        for column, values in zip(columns, (embeds, plain, targets), strict=True):
            column.append(values[rows.to(values.device)].to(device))
    _, (embeds, plain, targets) = gather_in_order(positions, *(torch.cat(column) for column in columns))
    return Guided(embeds.float().cpu(), plain.float().cpu(), targets.cpu())


def nearest_mean_accuracy(means_of: Tensor, means_targets: Tensor, embeds: Tensor, targets: Tensor) -> float:
    """How often a picture's nearest class mean, over other pictures, is that of its own class.

    Args:
        means_of, embeds: [pictures, embed_dim]; means_targets, targets: [pictures], -1 where there is no class.
    """
    present = means_targets[means_targets >= 0].unique()
    means = torch.stack([means_of[means_targets == number].mean(0) for number in present])
    known = targets >= 0
    predicted = present[(embeds[known] @ F.normalize(means, dim=-1).T).argmax(1)]
    return float((predicted == targets[known]).double().mean())


def _largest_share(targets: Tensor) -> float:
    known = targets[targets >= 0]
    return float(torch.bincount(known).max() / len(known))
