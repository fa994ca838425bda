"""Method `explain`: a page of pictures with what mattered in them, nearest training examples, and the pointing game."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from mmscale.adapt.base import load_base
from mmscale.adapt.combine.sources import check_alone, open_split, write_report
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.explain.drawing import Map, overlay, shaded_words, sheet
from mmscale.adapt.explain.pointing import PointingGame, boxes_of, peak
from mmscale.adapt.explain.relevance import (
    Covered,
    caption_relevance,
    caption_word_relevance,
    class_relevance,
    cover,
    matching_relevance,
    matching_word_relevance,
)
from mmscale.adapt.labels import records
from mmscale.config import Paths
from mmscale.data.sources import train_shards
from mmscale.errors import UserError
from mmscale.evaluate.captioning import generate_captions
from mmscale.evaluate.encoding import encode_own_texts
from mmscale.evaluate.page import cards, page, table
from mmscale.evaluate.pictures import Picture, read_again, read_pictures
from mmscale.evaluate.search import PictureIndex, open_index
from mmscale.evaluate.zeroshot import class_embeddings, class_name, read_lines, read_templates
from mmscale.pretrained import Pretrained


def explain(config: AdaptConfig) -> int:
    """Writes `report.html`, `report.json`, and a picture of the maps of every sample to `run.dir/maps`."""
    check_alone("explain")
    model, settings = load_base(config), config.adapt.explain
    sources = settings.pictures or _listed(config.data.val)
    if not sources:
        raise UserError("adapt.explain.pictures: not set, and neither is data.val: there is nothing to explain")
    folder = Path(config.run.dir)
    (folder / "maps").mkdir(parents=True, exist_ok=True)
    explainer = Explainer(config, model)
    index = None
    if settings.nearest and (config.data.train or config.data.sources):
        shards = [path for group in train_shards(config.data)[0] for path in group]
        index = open_index(model, shards, folder / "index", say=print)
    sections, shown = [], []
    for number, picture in enumerate(read_pictures(sources, model, settings.samples)):
        html, facts = explainer.section(picture, index, folder / "maps" / f"{number:04d}.png")
        sections.append(html)
        shown.append(facts)
    report: dict = {"model": str(model.path), "pictures": shown}
    if (game := play(config, explainer)) is not None:
        report["pointing"] = {"shares": game.shares(), "tries": dict(game.tries)}
        rows = [(kind, f"{share:.1%}", game.tries[kind]) for kind, share in sorted(game.shares().items())]
        sections.insert(0, table("Pointing game: the peak lies on what was named", ("", "hits", "tries"), rows))
        for kind, share, tries in rows:
            print(f"pointing game, {kind}: {share} of {tries}", flush=True)
    write_report(folder, report)
    (folder / "report.html").write_text(page(f"Why {model.path} answers so", *sections), encoding="utf-8")
    print(folder / "report.html")
    return 0


class Explainer:
    """A model with the classes it tells apart, asked about one picture at a time."""

    def __init__(self, config: AdaptConfig, model: Pretrained):
        self.settings, self.pretrained = config.adapt.explain, model
        self.model, self.tokenizer = model.model, model.tokenizer
        self.decodes = self.model.decoder is not None
        self.names = _class_names(config)
        self.class_embeds = None
        if self.names:
            templates = read_templates(config.eval.templates)
            self.class_embeds = class_embeddings(self.model, self.tokenizer, self.names, templates, config.eval.batch)
        with torch.no_grad():
            self.scale = float(self.model.logit_scale()[0])

    def cover(self, pixels: Tensor) -> Covered:
        return cover(self.model, pixels, self.settings.window, self.settings.batch)

    def matching(self, covered: Covered, text: str) -> Tensor:
        return matching_relevance(covered, encode_own_texts(self.model, self.tokenizer, [text], 1)[0])

    def section(self, picture: Picture, index: PictureIndex | None, file: Path) -> tuple[str, dict]:
        """The HTML about a picture, and what was found as JSON; writes the maps to `file`."""
        covered = self.cover(picture.pixels)
        caption = picture.captions[0] if picture.captions else ""
        if self.decodes:
            caption = generate_captions(self.model, self.tokenizer, picture.pixels[None])[0]
        words = caption.split()
        maps: list[Map] = [("picture", None)]
        facts: dict = {"name": picture.name, "caption": caption}
        lines = []
        if words:
            maps.append(("matches the caption", self.matching(covered, caption)))
            weights = matching_word_relevance(self.model, self.tokenizer, covered.image_embeds[0], words)
            lines.append(shaded_words("matching:", words, weights))
            facts["matching_words"] = weights
        if self.class_embeds is not None:
            number, relevance = class_relevance(covered, self.class_embeds, self.scale)
            facts["class"] = self.names[number]
            maps.append((f"class: {self.names[number]}", relevance))
        if words and self.decodes:
            found = caption_relevance(self.model, self.tokenizer, covered, words)
            maps += zip(words, found, strict=True)
            earlier = caption_word_relevance(self.model, self.tokenizer, covered.image_tokens[0], words)
            lines += [
                shaded_words(f"{word}, after:", words[:number], earlier[number, :number].tolist())
                for number, word in enumerate(words)
                if number
            ]
        facts["maps"] = {title: relevance.tolist() for title, relevance in maps if relevance is not None}
        sheet(picture.pixels, maps).save(file)
        shown = [(overlay(picture.pixels, relevance), [("", title), *_most(relevance)]) for title, relevance in maps]
        html = cards(f"{picture.name}: {caption}", shown)
        if lines:
            html += f"<details open><summary>{escape('words that mattered')}</summary>\n{''.join(lines)}</details>\n"
        if index is not None:
            near, facts["nearest"] = self._nearest(covered.image_embeds[0], caption, index)
            html += near
        return html, facts

    def _nearest(self, image_embed: Tensor, caption: str, index: PictureIndex) -> tuple[str, dict]:
        """Training examples that are nearest to the picture, and to what the model says about it."""
        asked = {"nearest training examples to the picture": image_embed[None]}
        if caption:
            asked["nearest training examples to the answer"] = encode_own_texts(
                self.model, self.tokenizer, [caption], 1
            )
        html, facts = "", {}
        for title, embeds in asked.items():
            found = index.search(embeds, self.settings.nearest)[0]
            entries = [
                (
                    read_again(answer.entry.source, answer.entry.place, self.pretrained).pixels,
                    [("", answer.entry.caption or ""), ("muted", f"{answer.similarity:.3f} {answer.entry.name}")],
                )
                for answer in found
            ]
            html += cards(title, entries).replace("<h2>", "<h3>").replace("</h2>", "</h3>")
            facts[title] = [
                {"name": answer.entry.name, "caption": answer.entry.caption, "similarity": answer.similarity}
                for answer in found
            ]
        return html, facts


def play(config: AdaptConfig, explainer: Explainer) -> PointingGame | None:
    """The pointing game on `data.val`, over the samples whose JSON says what is where; None when there are none.

    A picture with one object is asked for the object's word in a caption, for its class, and for its whole caption; one
    with several, for each word of a caption that names some of its objects and not the others.
    """
    if config.data.val is None:
        return None
    game, size = PointingGame(), explainer.pretrained.image_size
    for batch in open_split(config, explainer.pretrained, config.data.val, "data.val"):
        for row in batch.valid.nonzero().flatten().tolist():
            objects = boxes_of(batch.records[row], config.adapt.explain.object_name, size)
            if objects:
                _play_one(game, explainer, batch.pixel_values[row], batch.captions[row][0], objects, size)
    return game if game.tries else None


def _play_one(game: PointingGame, explainer: Explainer, pixels: Tensor, caption: str, objects: list, size: int) -> None:
    words, names = caption.split(), {name for name, _ in objects}
    if len(objects) > 1 and len(names) == 1:
        return  # wherever it points, it is the right thing
    covered, single = explainer.cover(pixels), len(objects) == 1
    kind = "one object" if single else "several objects"

    def add(what: str, relevance: Tensor, boxes: list) -> None:
        game.add(f"{kind}: {what}", peak(relevance, size), boxes)

    word_maps = {}
    if explainer.decodes:
        found = caption_relevance(explainer.model, explainer.tokenizer, covered, words)
        word_maps = {word.lower().strip(".,"): relevance for word, relevance in zip(words, found, strict=True)}
    for name in sorted(names):
        boxes = [box for own, box in objects if own == name]
        named = next((word for word in word_maps if word == name or word in (f"{name}s", f"{name}es")), None)
        if named is not None:
            add("word of a caption", word_maps[named], boxes)
        if single:
            if explainer.class_embeds is not None:
                add("class", class_relevance(covered, explainer.class_embeds, explainer.scale)[1], boxes)
            add("match with the caption", explainer.matching(covered, caption), boxes)
        if single or named is not None:
            game.add(f"{kind}: (guess: centre of the picture)", (size / 2, size / 2), boxes)
            for part in range(covered.grid[0] * covered.grid[1]):
                anywhere = torch.zeros(covered.grid)
                anywhere.view(-1)[part] = 1
                add("(guess: any patch)", anywhere, boxes)


def _most(relevance: Tensor | None) -> list[tuple[str, str]]:
    """A line that says how much there is to see: brightness is relative to it."""
    return [] if relevance is None else [("muted", f"peak {float(relevance.max()):.3g}")]


def _class_names(config: AdaptConfig) -> list[str]:
    if config.eval.classnames:
        return read_lines(config.eval.classnames, "class names")
    if config.data.val is None:
        return []
    return sorted({name for record in records(config.data.val, config.data) if (name := class_name(record))})


def _listed(paths: Paths | None) -> Sequence[str]:
    return [paths] if isinstance(paths, str) else paths or []
