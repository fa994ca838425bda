"""Toy shards: drawn pictures of coloured shapes, with captions that say exactly what is drawn.

A scene is either one group of equal shapes ("three small green stars") or two groups in a relation ("a small red circle
above two large blue squares"). Every caption of a scene names all its attributes, no two scenes share a caption, and a
picture never fits two of them, so that a generated caption is right or wrong without judgement.

A hash of (seed, scene) says to which split a scene belongs, so that no scene, hence no picture, of `val` is ever
trained on, whatever the numbers of samples. About a quarter of all scenes belong to `val`.

The shards are laid out as img2dataset writes them: `KEY.jpg`, `KEY.txt` (one of the captions) and `KEY.json`,
which holds
    captions    all phrasings of the scene
    class_name  the shape, in pictures of one group only: these are the ones that zero-shot classification uses
    relation    `above` or `left of` (first group to second); null for a single group
    objects     one entry for every drawn shape: shape, color, size, group (0 or 1) and box, which is
                [left, top, right, bottom] in pixels, right and bottom exclusive
beside img2dataset's own key, caption, status, width and height.
"""

import hashlib
import io
import json
import math
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from mmscale.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (214, 36, 36),
    "orange": (240, 135, 30),
    "yellow": (245, 230, 50),
    "green": (40, 160, 60),
    "cyan": (60, 200, 215),
    "blue": (40, 70, 205),
    "purple": (165, 60, 200),
    "black": (20, 20, 20),
}
SIZES = {"small": 9, "large": 13}  # radius in pixels
COUNTS = ("a", "two", "three")
# Shapes lie near the centres of 4 x 4 cells, so that none touches another; a half is two columns or two rows of them.
CELL = 32
ANYWHERE = [(row, column) for row in range(4) for column in range(4)]
HALVES = {
    "on the left": [(row, column) for row in range(4) for column in (0, 1)],
    "on the right": [(row, column) for row in range(4) for column in (2, 3)],
    "at the top": [(row, column) for row in (0, 1) for column in range(4)],
    "at the bottom": [(row, column) for row in (2, 3) for column in range(4)],
}
RELATIONS = {"above": ("at the top", "at the bottom"), "left of": ("on the left", "on the right")}
INVERSE = {"above": "below", "left of": "right of"}

PICTURE_SIZE = 4 * CELL
SHIFT = 2  # pixels that a shape may lie off the centre of its cell, each way
# The mean colour of photographs, which becomes zero where pixels are normalised: what is drawn stands out at once.
BACKGROUND = (123, 117, 104)
OUTLINE = (255, 255, 255)  # the same around every color, so that a shape looks the same in each
SUPERSAMPLING = 2
JPEG_QUALITY = 92
STAGING = ".partial"


@dataclass(frozen=True)
class Group:
    """One to three equal shapes."""

    count: int
    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        plural = "" if self.count == 1 else "es" if self.shape.endswith("s") else "s"
        return f"{COUNTS[self.count - 1]} {self.size} {self.color} {self.shape}{plural}"


@dataclass(frozen=True)
class Scene:
    """What is drawn: one group anywhere, or two groups and the relation of the first to the second."""

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def captions(self) -> list[str]:
        """All phrasings; each of them belongs to this scene only."""
        first = self.groups[0]
        there = "there is" if first.count == 1 else "there are"
        if self.relation is None:
            statement, last = str(first), f"this shows {first}"
        else:
            statement = f"{first} {self.relation} {self.groups[1]}"
            last = f"{self.groups[1]} {INVERSE[self.relation]} {first}"
        return [statement, f"a picture of {statement}", f"{there} {statement}", last]

    def split(self, seed: int) -> str:
        """`train` or `val`: a function of the scene and the seed alone."""
        digest = hashlib.sha256(f"{seed}/{self.captions[0]}".encode()).digest()
        return "val" if digest[0] < 64 else "train"


def every_group() -> Iterator[Group]:
    """All 288 groups."""
    for shape in SHAPES:
        for color in COLORS:
            for size in SIZES:
                for count in range(1, len(COUNTS) + 1):
                    yield Group(count, size, color, shape)


def draw(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[dict]]:
    """The picture of a scene, 128 x 128 pixels, and its `objects`; places, shades and radii vary with `rng`."""
    background = tuple(channel + rng.randrange(-3, 4) for channel in BACKGROUND)
    canvas = Image.new("RGB", (PICTURE_SIZE * SUPERSAMPLING,) * 2, background)
    brush = ImageDraw.Draw(canvas)
    objects = []
    for number, (group, cells) in enumerate(zip(scene.groups, _cells(scene, rng), strict=True)):
        color = tuple(min(255, max(0, channel + rng.randrange(-18, 19))) for channel in COLORS[group.color])
        for x, y, radius in _places(group, cells, rng):
            box = _draw_shape(brush, group.shape, x, y, radius, color, background)
            attributes = {"shape": group.shape, "color": group.color, "size": group.size}
            objects.append({**attributes, "group": number, "box": box})
    return canvas.reduce(SUPERSAMPLING), objects


def make_toy(
    out: str | Path,
    samples: int = 4096,
    shards: int = 8,
    seed: int = 0,
    val_samples: int = 512,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, int]:
    """Writes `train-%05d.tar` and `val-%05d.tar` into `out`; the same arguments give the same bytes.

    `val` comes on top of `samples`. Half of its pictures show one group, in one of about 72 scenes that are drawn again
    and again; the scenes of the other half are all distinct. `progress` is called with the number of samples written so
    far. Returns the number of samples of each split. Raises UserError when a number is out of range or `out` holds
    something already.
    """
    if shards < 1 or samples < shards:
        raise UserError(f"--samples {samples} --shards {shards}: every shard needs at least one sample")
    if val_samples < 1:
        raise UserError(f"--val-samples {val_samples}: give at least one")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder that does not exist or is empty")
    if out.is_dir() and any(entry.name != STAGING for entry in out.iterdir()):
        raise UserError(f"{out}: is not empty; give a new folder, or remove what is in it")
    staging = out / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write_split(staging, "train", _train_scenes(seed), samples, shards, seed, progress)
        val_shards = min(val_samples, max(1, shards // 4))
        _write_split(
            staging, "val", _val_scenes(seed), val_samples, val_shards, seed, lambda done: progress(samples + done)
        )
        for path in sorted(staging.iterdir()):
            path.rename(out / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"train": samples, "val": val_samples}


def _train_scenes(seed: int) -> Iterator[Scene]:
    rng = random.Random(f"{seed}/train/scenes")
    singles = _single_scenes(seed, "train")
    groups = list(every_group())
    while True:
        if rng.randrange(2):
            yield rng.choice(singles)
        else:
            scene = _random_pair(groups, rng)
            while scene.split(seed) != "train":
                scene = _random_pair(groups, rng)
            yield scene


def _val_scenes(seed: int) -> Iterator[Scene]:
    """One group and two groups in turn."""
    rng = random.Random(f"{seed}/val/scenes")
    singles = _single_scenes(seed, "val")
    groups = list(every_group())
    seen: set[Scene] = set()
    while True:
        rng.shuffle(singles)
        for single in singles:
            yield single
            pair = _random_pair(groups, rng)
            while pair in seen or pair.split(seed) != "val":
                pair = _random_pair(groups, rng)
            seen.add(pair)
            yield pair


def _single_scenes(seed: int, split: str) -> list[Scene]:
    return [scene for group in every_group() if (scene := Scene((group,))).split(seed) == split]


def _random_pair(groups: list[Group], rng: random.Random) -> Scene:
    first, second = rng.sample(groups, 2)
    while (first.shape, first.color) == (second.shape, second.color):
        second = rng.choice(groups)
    return Scene((first, second), rng.choice(list(RELATIONS)))


def _cells(scene: Scene, rng: random.Random) -> list[list[tuple[int, int]]]:
    """The (row, column) of each shape, group by group.

    Of two groups one is never both above and left of the other: then either relation could be stated.
    """
    if scene.relation is None:
        return [rng.sample(ANYWHERE, scene.groups[0].count)]
    halves = [HALVES[half] for half in RELATIONS[scene.relation]]
    across = 1 if scene.relation == "above" else 0
    while True:
        cells = [rng.sample(half, group.count) for half, group in zip(halves, scene.groups, strict=True)]
        first, second = ([cell[across] for cell in group] for group in cells)
        if min(first) <= max(second) and min(second) <= max(first):
            return cells


def _places(group: Group, cells: list[tuple[int, int]], rng: random.Random) -> Iterator[tuple[int, int, int]]:
    """Centre and radius, in supersampled pixels, of each shape of a group."""
    radius = SIZES[group.size] * SUPERSAMPLING
    radius = rng.randrange(radius * 93 // 100, radius * 105 // 100 + 1)
    for row, column in cells:
        shift_x, shift_y = rng.randrange(-SHIFT, SHIFT + 1), rng.randrange(-SHIFT, SHIFT + 1)
        x, y = column * CELL + CELL // 2 + shift_x, row * CELL + CELL // 2 + shift_y
        yield x * SUPERSAMPLING, y * SUPERSAMPLING, radius


def _draw_shape(
    brush: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, color: tuple, background: tuple
) -> list[int]:
    """Draws one shape, in supersampled pixels; returns its box in pixels of the picture."""
    if shape in ("circle", "ring"):
        box = [x - radius, y - radius, x + radius, y + radius]
        brush.ellipse(box, fill=color, outline=OUTLINE, width=2 * SUPERSAMPLING)
        if shape == "ring":
            hole = radius * 11 // 20
            brush.ellipse([x - hole, y - hole, x + hole, y + hole], background, OUTLINE, 2 * SUPERSAMPLING)
    else:
        corners = [(x + round(dx * radius / 100), y + round(dy * radius / 100)) for dx, dy in _OUTLINES[shape]]
        brush.polygon(corners, color, OUTLINE, 2 * SUPERSAMPLING)
        xs, ys = zip(*corners, strict=True)
        box = [min(xs), min(ys), max(xs), max(ys)]
    low, high = box[:2], box[2:]
    return [edge // SUPERSAMPLING for edge in low] + [edge // SUPERSAMPLING + 1 for edge in high]


def _star(points: int, inner: int) -> list[tuple[int, int]]:
    """Corners of a star in percent of its radius, the first one on top."""
    corners = []
    for number in range(2 * points):
        length = inner if number % 2 else 100
        angle = math.pi * number / points
        corners.append((round(length * math.sin(angle)), round(-length * math.cos(angle))))
    return corners


_OUTLINES = {  # in percent of the radius
    "square": [(-85, -85), (85, -85), (85, 85), (-85, 85)],
    "triangle": [(0, -95), (98, 80), (-98, 80)],
    "star": _star(5, 42),
    "cross": [
        *[(-32, -98), (32, -98), (32, -32), (98, -32), (98, 32), (32, 32)],
        *[(32, 98), (-32, 98), (-32, 32), (-98, 32), (-98, -32), (-32, -32)],
    ],
}


def _write_split(
    folder: Path, split: str, scenes: Iterator[Scene], samples: int, shards: int, seed: int, progress: Callable
) -> None:
    for shard in range(shards):
        start, stop = samples * shard // shards, samples * (shard + 1) // shards
        with tarfile.open(folder / f"{split}-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, stop):
                rng = random.Random(f"{seed}/{split}/{number}")
                _write_sample(tar, f"{shard:05d}{number - start:04d}", next(scenes), rng)
        progress(stop)


def _write_sample(tar: tarfile.TarFile, key: str, scene: Scene, rng: random.Random) -> None:
    picture, objects = draw(scene, rng)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    caption = rng.choice(scene.captions)
    record = {"key": key, "caption": caption, "status": "success", "width": picture.width, "height": picture.height}
    if len(scene.groups) == 1:
        record["class_name"] = scene.groups[0].shape
    record |= {"captions": scene.captions, "relation": scene.relation, "objects": objects}
    members = {"jpg": jpeg.getvalue(), "txt": caption.encode(), "json": json.dumps(record).encode()}
    for extension, content in members.items():
        # A bare TarInfo has no owner, no user name and time 0: nothing of this machine gets into the bytes.
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
