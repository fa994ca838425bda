"""Kind `words`: templates and label words found by search, without training, and what calibration makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.prompts.answers import search_answers, vocabulary_words
from mmscale.adapt.prompts.calibration import calibration_table
from mmscale.adapt.prompts.classes import Classes
from mmscale.adapt.prompts.metrics import describe, merit
from mmscale.adapt.prompts.pictures import encode_content_free, encode_splits
from mmscale.adapt.prompts.scorers import SCORERS
from mmscale.adapt.prompts.templates import grow_ensemble, rank, recombined, templates_of_captions
from mmscale.adapt.tuning import open_split
from mmscale.errors import UserError
from mmscale.evaluate.captioning import generate_captions
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.zeroshot import read_templates
from mmscale.pretrained import Pretrained

SHOWN = 20  # templates of the ranking in the report


class WordSearch:
    """Templates first, then label words, both by the dev split; test is scored at the end."""

    def __init__(self, config: AdaptConfig, base: Pretrained, classes: Classes):
        self.config, self.base, self.classes = config, base, classes
        self.settings = config.adapt.prompts
        self.scorer = SCORERS[self.settings.scorer](base.model, base.tokenizer)
        self.splits = encode_splits(config, base, classes, self.scorer.needs_tokens)
        self.dev = self.splits["dev"]

    def run(self) -> dict[str, Any]:
        """The report. Under `scores`, of the last split: what was chosen by hand and in each stage of the search; for
        the first and the best of these, with each kind of calibration, too."""
        words, hand = self.classes.first_words, read_templates(self.settings.templates)
        ranked = rank([*hand, *self._candidates(hand)], self._on_dev, self.dev.targets)
        templates = grow_ensemble(ranked, self._on_dev, self.dev.targets, self.settings.ensemble)
        stages = {
            "by hand": (hand, words),
            "templates": (templates, words),
            "templates and words": (templates, self._answers(templates)),
        }
        merits = {stage: merit(self._on_dev(*prompts), self.dev.targets) for stage, prompts in stages.items()}
        best = max(merits, key=merits.__getitem__)
        last = list(self.splits)[-1]
        judged = self.splits[last]
        scores = {}
        for stage, (templates, words) in stages.items():
            scores[stage] = describe(self.scorer(judged, words, templates), judged.targets)
        for stage in dict.fromkeys(("by hand", best)):
            for way, found in self._calibrated(*stages[stage]).items():
                scores[f"{stage}, {way}"] = found
        return {
            "scored_on": last,
            "scores": scores,
            "chosen": best,
            "prompts": {
                stage: {"templates": templates, "words": dict(zip(self.classes.names, words, strict=True))}
                for stage, (templates, words) in stages.items()
            },
            "dev_balanced_accuracy": {stage: accuracy for stage, (accuracy, _) in merits.items()},
            "num_candidates": len(ranked),
            "ranking": ranked[:SHOWN],
        }

    def _on_dev(self, templates: Sequence[str], words: Sequence[str] | None = None):
        return self.scorer(self.dev, words or self.classes.first_words, templates)

    def _candidates(self, hand: list[str]) -> list[str]:
        """Templates from captions of training pictures, and put together from those and the ones by hand."""
        words = [word for own in self.classes.words.values() for word in own]
        found = templates_of_captions(self._captions(), words, self.settings.from_captions)
        return [*found, *recombined([*hand, *found], self.settings.recombined)]

    def _captions(self) -> list[str]:
        model, tokenizer, settings = self.base.model, self.base.tokenizer, self.settings
        if not settings.from_captions:
            return []
        if settings.written_by == "model" and model.decoder is None:
            raise UserError("adapt.prompts.written_by: this model has no decoder to write captions with; take people")
        split = open_split(self.config, model, tokenizer, self.config.data.train, settings.sample)
        if settings.written_by == "people":
            return [caption for batch in split for captions in batch.captions for caption in captions]
        device = model_device(model)
        return [text for b in split for text in generate_captions(model, tokenizer, b.pixel_values.to(device))]

    def _answers(self, templates: list[str]) -> list[str]:
        """For each class the best of its words, and of the tokenizer's where those are wanted."""
        more = vocabulary_words(self.base.tokenizer) if self.settings.vocabulary else []
        candidates = [list(dict.fromkeys([*own, *more])) for own in self.classes.words.values()]
        every = list(dict.fromkeys(word for own in candidates for word in own))
        column = {word: number for number, word in enumerate(every)}
        scores = self._on_dev(templates, every)
        own = [scores[:, [column[word] for word in words]] for words in candidates]
        chosen = search_answers(own, self.dev.targets)
        return [words[number] for words, number in zip(candidates, chosen, strict=True)]

    def _calibrated(self, templates: list[str], words: list[str]) -> dict[str, dict[str, float]]:
        judged = list(self.splits.values())[-1]
        empty = encode_content_free(self.config, self.base, self.scorer.needs_tokens)
        return calibration_table(
            self.scorer(self.dev, words, templates),
            self.dev.targets,
            self.scorer(empty, words, templates),
            self.scorer(judged, words, templates),
            judged.targets,
        )


def write_templates(folder: Path, report: dict[str, Any]) -> None:
    """The chosen templates, one a line, as `eval.templates` takes them."""
    lines = report["prompts"][report["chosen"]]["templates"]
    (folder / "templates.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
