"""`mmscale eval`: a table, figures that can be repeated, and a page with pictures of hits and misses."""

import json

import numpy as np
import pytest
from checkpoints import write_checkpoint
from small_split import NUM_SAMPLES, write_shard

from mmscale.errors import UserError
from mmscale.evaluate.command import evaluate_command
from mmscale.evaluate.evaluation_page import _confusions
from mmscale.evaluate.pictures import PlacedPictures, read_pictures
from mmscale.evaluate.zeroshot import Classification
from mmscale.pretrained import load_pretrained


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_checkpoint(folder / "run")
    write_shard(folder / "val.tar")
    return folder


def test_scores_are_kept_with_what_repeats_them_and_shown_on_a_page(place, tmp_path, capsys):
    settings = {"tasks": ["zeroshot", "retrieval", "caption", "vqa"], "batch": 7, "distinct_pairs": 9}
    files = {"output": tmp_path / "scores.json", "html": tmp_path / "scores.html"}
    scores = evaluate_command(place / "run", str(place / "val.tar"), settings=settings, device="cpu", **files)
    record = json.loads(files["output"].read_text())
    assert record["scores"] == scores
    assert record["data"] == str(place / "val.tar") and record["settings"]["distinct_pairs"] == 9
    assert record["samples_trained_on"] == 24 and record["environment"]["ranks"] == 1
    table = capsys.readouterr().out
    assert "num_samples" in table and str(NUM_SAMPLES - 1) in table and "zeroshot_top1" in table
    page = files["html"].read_text()
    for title in ("Who was taken for whom", "Captions: misses", "Answers: misses", "farthest from their caption"):
        assert title in page
    assert page.count("data:image/png;base64,") > 20


def test_an_unknown_task_is_refused_with_the_known_ones(place):
    with pytest.raises(UserError, match="unknown task `clip`; the tasks are zeroshot, retrieval, caption, vqa"):
        evaluate_command(place / "run", str(place / "val.tar"), ["clip"])


def test_a_setting_that_is_not_one_is_refused(place):
    with pytest.raises(UserError, match="unknown key `distinct`"):
        evaluate_command(place / "run", str(place / "val.tar"), settings={"distinct": 3}, device="cpu")


def test_pictures_by_place_are_those_of_the_split(place):
    pretrained = load_pretrained(place / "run", device="cpu")
    placed = PlacedPictures(str(place / "val.tar"), pretrained)
    for picture in read_pictures([str(place / "val.tar")], pretrained):
        assert (placed.read(picture.place) == picture.pixels).all()
    with pytest.raises(UserError, match="the shards have changed"):
        placed.read(NUM_SAMPLES)


def test_of_many_classes_the_most_frequent_confusions_are_listed():
    names = [f"class <{number}>" for number in range(50)]
    targets = np.array([0] * 5 + [1] * 3 + [2])
    ranked = np.array([[7]] * 5 + [[9]] * 3 + [[2]])
    html = _confusions(Classification(names, targets, ranked))
    assert html.index("class &lt;7&gt;") < html.index("class &lt;9&gt;") and "class &lt;2&gt;" not in html
