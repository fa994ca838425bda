"""A page that shows an evaluation: scores, who was taken for whom, and pictures of hits and misses."""

from collections.abc import Iterable, Sequence

import numpy as np

from mmscale.config import Paths
from mmscale.evaluate.page import cards, heat_table, page, table
from mmscale.evaluate.pictures import PlacedPictures
from mmscale.evaluate.run import Evaluation
from mmscale.evaluate.zeroshot import Classification
from mmscale.pretrained import Pretrained

SHOWN = 12  # pictures of a kind
MOST_CLASSES = 40  # of a whole confusion matrix; of more classes, the most frequent confusions are listed

Outcome = tuple[int, bool, list[tuple[str, str]]]  # position, whether it is a hit, the lines below its picture


def evaluation_page(evaluation: Evaluation, pretrained: Pretrained, shards: Paths) -> str:
    """The page as HTML. The pictures are read again from the shards, only those that are shown."""
    pictures = PlacedPictures(shards, pretrained)
    where = shards if isinstance(shards, str) else " ".join(shards)
    rows = [(name, show_score(name, value)) for name, value in evaluation.scores.items()]
    sections = [table("Scores", ("score", "value"), rows)]
    for name, task in evaluation.tasks.items():
        if name == "zeroshot" and task.classification is not None:
            sections.append(_confusions(task.classification))
            sections += _hits_and_misses("Zero-shot", _classified(task.positions, task.classification), pictures)
        elif name == "caption":
            sections += _hits_and_misses("Captions", map(_captioned, task.captions), pictures)
        elif name == "vqa":
            sections += _hits_and_misses("Answers", map(_answered, task.questions), pictures)
        elif name == "retrieval":
            worst = sorted(task.ranks.items(), key=lambda entry: -entry[1])[:SHOWN]
            entries = [(pictures.read(position), [("bad", f"rank {rank:g}")]) for position, rank in worst if rank > 1]
            sections.append(cards("Retrieval: pictures farthest from their caption", entries))
    return page(f"{pretrained.path} on {where}", *sections)


def show_score(name: str, value: float) -> str:
    """A figure for people: counts, ranks and CIDEr as they are, shares in per cent."""
    if isinstance(value, int) or name.endswith(("_rank", "_cider")):
        return f"{value:,.6g}"
    return f"{value:.2%}"


def _hits_and_misses(title: str, outcomes: Iterable[Outcome], pictures: PlacedPictures) -> list[str]:
    hits, misses = [], []
    for position, hit, lines in outcomes:
        chosen = hits if hit else misses
        if len(chosen) < SHOWN:
            chosen.append((pictures.read(position), lines))
    return [cards(f"{title}: misses", misses), cards(f"{title}: hits", hits)]


def _classified(positions: Sequence[int], found: Classification) -> Iterable[Outcome]:
    for position, target, ranked in zip(positions, found.targets, found.ranked, strict=True):
        hit = bool(ranked[0] == target)
        lines = [("good" if hit else "bad", found.names[ranked[0]])]
        yield position, hit, lines if hit else [*lines, ("muted", f"is: {found.names[target]}")]


def _captioned(caption) -> Outcome:
    lines = [("good" if caption.matches else "bad", caption.generated), ("muted", caption.references[0])]
    return caption.position, caption.matches, lines[:1] if caption.matches else lines


def _answered(question) -> Outcome:
    hit = question.accuracy == 1
    lines = [("", question.question), ("good" if hit else "bad", question.answer), ("muted", question.answers[0])]
    return question.position, hit, lines[:2] if hit else lines


def _confusions(found: Classification) -> str:
    matrix = found.confusion()
    if len(found.names) <= MOST_CLASSES:
        return heat_table("Who was taken for whom (rows are right, columns predicted)", found.names, matrix)
    np.fill_diagonal(matrix, 0)
    worst = np.argsort(matrix, axis=None)[::-1][:50]
    rows = [
        (found.names[right], found.names[predicted], matrix[right, predicted])
        for right, predicted in zip(*np.unravel_index(worst, matrix.shape), strict=True)
        if matrix[right, predicted]
    ]
    return table("Most frequent confusions", ("is", "was taken for", "times"), rows)
