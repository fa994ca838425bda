"""Toy shards: what is promised about scenes, captions, splits, files and bytes."""

import io
import itertools
import json
import random
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmscale.data import toy
from mmscale.errors import UserError


def read(folder, split):
    """[(key, picture bytes, text, record)] of a split, in order."""
    samples = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        for (jpg, picture), (txt, text), (js, record) in zip(*[iter(members)] * 3, strict=True):
            key = jpg.removesuffix(".jpg")
            assert (txt, js) == (f"{key}.txt", f"{key}.json")
            samples.append((key, picture, text.decode(), json.loads(record)))
    return samples


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "shards"
    toy.make_toy(folder, samples=600, shards=4, seed=3)
    return folder


def all_scenes():
    groups = list(toy.every_group())
    singles = [toy.Scene((group,)) for group in groups]
    pairs = [toy.Scene(pair, relation) for pair in itertools.permutations(groups, 2) for relation in toy.RELATIONS]
    return singles, random.Random(0).sample(pairs, 20_000)


def test_layout_is_img2datasets(shards):
    assert sorted(path.name for path in shards.iterdir()) == [
        "train-00000.tar",
        "train-00001.tar",
        "train-00002.tar",
        "train-00003.tar",
        "val-00000.tar",
    ]
    samples = read(shards, "train")
    assert len(samples) == 600
    assert samples[0][0] == "000000000" and samples[-1][0] == "000030149"
    for key, picture, text, record in samples[:20]:
        image = Image.open(io.BytesIO(picture))
        assert image.format == "JPEG" and image.layer[1][1:3] == (1, 1)  # chroma at full resolution
        assert image.size == (record["width"], record["height"]) == (128, 128)
        assert record["key"] == key and record["caption"] == text and text in record["captions"]


def test_same_arguments_same_bytes(shards, tmp_path):
    toy.make_toy(tmp_path / "again", samples=600, shards=4, seed=3)
    toy.make_toy(tmp_path / "other", samples=600, shards=4, seed=4)
    for path in shards.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()


def test_no_scene_and_no_picture_of_val_is_in_train(shards):
    train, val = read(shards, "train"), read(shards, "val")
    assert len(val) >= 512
    assert len({record["captions"][0] for *_, record in val}) >= 256
    assert not {record["captions"][0] for *_, record in val} & {record["captions"][0] for *_, record in train}
    assert not {picture for _, picture, *_ in val} & {picture for _, picture, *_ in train}


def test_splits_stay_apart_when_the_number_of_samples_changes(shards, tmp_path):
    toy.make_toy(tmp_path, samples=50, shards=1, seed=3, val_samples=2000)
    train = {record["captions"][0] for *_, record in read(shards, "train")}
    assert not train & {record["captions"][0] for *_, record in read(tmp_path, "val")}


def test_no_two_scenes_share_a_caption():
    singles, pairs = all_scenes()
    assert len({caption for scene in singles + pairs for caption in scene.captions}) == 4 * len(singles + pairs)


def test_every_caption_states_every_attribute():
    words = {"above": "above|below", "left of": "left of|right of"}
    singles, pairs = all_scenes()
    for scene in singles + pairs[:500]:
        for caption in scene.captions:
            assert scene.relation is None or any(word in caption for word in words[scene.relation].split("|"))
            for group in scene.groups:
                assert str(group) in caption


def test_every_kind_of_scene_is_there_in_good_proportion(shards):
    records = [record for *_, record in read(shards, "train")]
    single = [record for record in records if "class_name" in record]
    assert 0.4 < len(single) / len(records) < 0.6
    counts = Counter()
    for record in records:
        groups = {(item["group"], item["shape"], item["color"], item["size"]) for item in record["objects"]}
        assert len(groups) == (1 if "class_name" in record else 2)
        counts.update(attribute for group in groups for attribute in group[1:])
        counts.update(Counter(item["group"] for item in record["objects"]).values())
        counts[record["relation"]] += 1
    total = sum(counts[number] for number in (1, 2, 3))
    for values in (toy.SHAPES, toy.COLORS, toy.SIZES, (1, 2, 3)):
        for value in values:
            assert counts[value] > 0.6 * total / len(values), value
    assert min(counts[relation] for relation in toy.RELATIONS) > 0.05 * len(records)
    assert len(toy.SHAPES) >= 6 and len(toy.COLORS) >= 8


def test_class_name_is_the_shape_of_pictures_of_one_group(shards):
    for *_, record in read(shards, "val"):
        if "class_name" in record:
            assert {item["shape"] for item in record["objects"]} == {record["class_name"]}


def test_what_is_drawn_is_what_the_objects_say(shards):
    colors = {name: np.array(value) for name, value in toy.COLORS.items()}
    for _, picture, _, record in read(shards, "val")[:100]:
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
        outside = np.ones(pixels.shape[:2], dtype=bool)
        for item in record["objects"]:
            left, top, right, bottom = item["box"]
            inside = pixels[top:bottom, left:right]
            distance = np.abs(inside - np.median(pixels, (0, 1))).sum(-1)
            near = {name: (np.abs(inside - color).sum(-1) < 90).sum() for name, color in colors.items()}
            assert max(near, key=near.get) == item["color"]
            # The box is tight: the shape comes within three pixels of each side (a star has thin tips).
            rows, columns = np.nonzero(distance > 45)
            assert rows.min() <= 3 and columns.min() <= 3
            assert rows.max() >= bottom - top - 4 and columns.max() >= right - left - 4
            outside[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = False
        assert np.abs(pixels[outside] - np.median(pixels, (0, 1))).sum(-1).max() < 60  # what JPEG smears


def test_relations_hold_for_the_boxes(shards):
    for *_, record in read(shards, "val"):
        boxes = [[item["box"] for item in record["objects"] if item["group"] == group] for group in (0, 1)]
        if record["relation"] == "above":
            assert max(box[3] for box in boxes[0]) <= min(box[1] for box in boxes[1]) + 1
        elif record["relation"] == "left of":
            assert max(box[2] for box in boxes[0]) <= min(box[0] for box in boxes[1]) + 1
        else:
            assert record["relation"] is None and not boxes[1]


def test_a_folder_that_is_not_empty_is_refused_and_kept(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        toy.make_toy(tmp_path, samples=8, shards=1)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_an_interrupted_call_leaves_no_shards_and_can_be_repeated(tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.make_toy(tmp_path / "out", samples=8, shards=2, val_samples=4, progress=stop)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out" / toy.STAGING).mkdir()  # what a killed process leaves
    assert toy.make_toy(tmp_path / "out", samples=8, shards=2, val_samples=4) == {"train": 8, "val": 4}
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("arguments", [{"samples": 2, "shards": 3}, {"shards": 0}, {"val_samples": 0}])
def test_numbers_out_of_range_are_refused(tmp_path, arguments):
    with pytest.raises(UserError):
        toy.make_toy(tmp_path, **arguments)


def test_only_one_of_the_relations_holds(shards):
    for *_, record in read(shards, "train"):
        boxes = [[item["box"] for item in record["objects"] if item["group"] == group] for group in (0, 1)]
        if record["relation"] is not None:
            axis = 0 if record["relation"] == "above" else 1  # along which the groups must not lie apart
            (low, high), (other_low, other_high) = (
                (min(box[axis] for box in group), max(box[axis + 2] for box in group)) for group in boxes
            )
            assert low < other_high and other_low < high
