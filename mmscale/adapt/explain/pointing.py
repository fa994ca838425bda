"""The pointing game (https://arxiv.org/abs/1608.00507, section 4.1): does the peak of a map lie on what was named?"""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

Box = tuple[float, float, float, float]


@dataclass
class PointingGame:
    """Hits and tries of several kinds of maps; the picture's centre, as a guess, is one of them."""

    hits: Counter = field(default_factory=Counter)
    tries: Counter = field(default_factory=Counter)

    def add(self, kind: str, point: tuple[float, float], boxes: list[Box]) -> None:
        """`point` is x, y; it is a hit when it lies in one of the boxes (left, top, right, bottom)."""
        self.tries[kind] += 1
        self.hits[kind] += any(
            left <= point[0] < right and top <= point[1] < bottom for left, top, right, bottom in boxes
        )

    def shares(self) -> dict[str, float]:
        return {kind: self.hits[kind] / tries for kind, tries in self.tries.items()}


def peak(relevance: Tensor, size: int) -> tuple[float, float]:
    """x, y of the middle of the most relevant part, of a map [rows, columns] over a picture of `size` pixels."""
    rows, columns = relevance.shape
    row, column = divmod(int(relevance.argmax()), columns)
    return (column + 0.5) * size / columns, (row + 0.5) * size / rows


def seen_box(box: Box, width: float, height: float, size: int) -> Box:
    """A box of a picture, in pixels of what the model sees: the middle, resized so that the shorter side is `size`."""
    scale = size / min(width, height)
    left, top = (width * scale - size) / 2, (height * scale - size) / 2
    return (box[0] * scale - left, box[1] * scale - top, box[2] * scale - left, box[3] * scale - top)


def boxes_of(record: dict, key: str, size: int) -> list[tuple[str, Box]]:
    """(name, box) of every object in a sample's JSON, in pixels of what the model sees; none where it has no boxes."""
    found = []
    for item in record.get("objects") or []:
        if isinstance(item, dict) and item.get(key) and len(item.get("box") or []) == 4:
            width, height = record.get("width") or size, record.get("height") or size
            found.append((str(item[key]), seen_box(item["box"], width, height, size)))
    return found
