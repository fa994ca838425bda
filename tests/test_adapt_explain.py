"""Relevance maps, the pointing game, and the page that shows them."""

import json
from types import SimpleNamespace

import pytest
import torch
from checkpoints import write_checkpoint

from mmscale.adapt.command import adapt
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.explain.drawing import overlay, shaded_words
from mmscale.adapt.explain.pointing import PointingGame, boxes_of, peak, seen_box
from mmscale.adapt.explain.relevance import (
    caption_relevance,
    caption_word_relevance,
    cover,
    matching_relevance,
    matching_word_relevance,
    word_log_probabilities,
)
from mmscale.data.toy import make_toy
from mmscale.pretrained import load_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    write_checkpoint(folder / "run")
    make_toy(folder / "toy", samples=12, shards=1, val_samples=8)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder / "run", device="cpu")


class BrightCorner:
    """A model that only sees how red the patch at row 1, column 2 of 4 x 4 is."""

    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=8), image_mean=[0.5, 0.5, 0.5])

    def parameters(self):
        yield torch.zeros(1)

    def encode_image(self, pixels):
        red = pixels[:, 0, 8:16, 16:24].float().mean((1, 2)) / 255
        return red[:, None], red[:, None, None]


def test_the_map_is_what_the_score_loses_under_each_cover():
    pixels = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    covered = cover(BrightCorner(), pixels, batch=5)
    relevance = matching_relevance(covered, torch.ones(1))
    expected = torch.zeros(4, 4)
    expected[1, 2] = 1 - 128 / 255
    torch.testing.assert_close(relevance, expected)
    assert peak(relevance, 32) == (20, 12)
    wide = matching_relevance(cover(BrightCorner(), pixels, window=2), torch.ones(1))
    assert wide.shape == (2, 2) and int(wide.argmax()) == 1


def test_maps_of_words_come_from_the_models_own_log_probabilities(model):
    words = ["a", "small", "red", "circle"]
    pixels = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    covered = cover(model.model, pixels)
    ids = torch.tensor([model.tokenizer.encode(" ".join(words), 24)])
    with torch.no_grad():
        logits = model.model(input_ids=ids, pixel_values=pixels[None]).logits
    logs = logits[0, :-2].log_softmax(-1).gather(1, ids[0, 1:-1, None]).sum()
    found = word_log_probabilities(model.model, model.tokenizer, [words], covered.image_tokens[:1])[0]
    assert len(found) == 4 and float(found.sum()) == pytest.approx(float(logs), abs=1e-4)
    maps = caption_relevance(model.model, model.tokenizer, covered, words)
    again = word_log_probabilities(model.model, model.tokenizer, [words], covered.image_tokens[6:7])[0]
    for number in range(4):
        assert maps[number].shape == (4, 4)
        assert float(maps[number].flatten()[5]) == pytest.approx(float(found[number] - again[number]), abs=1e-5)


def test_words_are_left_out_one_by_one(model):
    words = ["two", "blue", "squares", "above"]
    covered = cover(model.model, torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8))
    earlier = caption_word_relevance(model.model, model.tokenizer, covered.image_tokens[0], words)
    assert bool((earlier.triu() == 0).all())
    tokens = covered.image_tokens[:1]
    whole = word_log_probabilities(model.model, model.tokenizer, [words], tokens)[0]
    without = word_log_probabilities(model.model, model.tokenizer, [["two", "squares", "above"]], tokens)[0]
    assert float(earlier[3, 1]) == pytest.approx(float(whole[3] - without[2]), abs=1e-5)
    assert len(matching_word_relevance(model.model, model.tokenizer, covered.image_embeds[0], words)) == 4


def test_boxes_are_seen_where_the_middle_of_the_picture_is_cut_out():
    assert seen_box((100, 0, 200, 100), 300, 100, 50) == (0, 0, 50, 50)
    record = {"width": 128, "height": 128, "objects": [{"shape": "ring", "box": [64, 0, 128, 32]}, {"box": [0] * 4}]}
    assert boxes_of(record, "shape", 64) == [("ring", (32, 0, 64, 16))]
    assert boxes_of({}, "shape", 64) == []


def test_the_pointing_game_counts_points_in_any_of_the_boxes():
    game = PointingGame()
    game.add("word", (5, 5), [(0, 0, 2, 2), (4, 4, 6, 6)])
    game.add("word", (6, 5), [(4, 4, 6, 6)])
    assert game.shares() == {"word": 0.5}


def test_the_overlay_dims_what_does_not_matter_and_frames_the_peak():
    pixels = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    relevance = torch.zeros(4, 4)
    relevance[0, 3] = 2.0
    drawn = overlay(pixels, relevance, side=64)
    assert int(drawn[:, 8, 56].min()) > 190 and drawn[:, 60, 4].tolist() == [50] * 3
    assert drawn[:, 0, 48].tolist() == [255] * 3
    assert torch.equal(overlay(pixels, None, side=64), pixels)
    assert int(overlay(pixels, -relevance, side=64).max()) == 50


def test_words_are_escaped():
    html = shaded_words("<i>", ["<script>", "b"], [1.0, 0.0])
    assert "<script>" not in html and "&lt;script&gt;" in html and "<i>" not in html


def test_a_page_maps_and_a_report_are_written(folder):
    config = AdaptConfig.model_validate(
        {
            "run": {"dir": str(folder / "why")},
            "data": {"train": str(folder / "toy/train-*.tar"), "val": str(folder / "toy/val-*.tar")},
            "model": {"init_from": str(folder / "run")},
            "adapt": {"method": "explain", "explain": {"samples": 2, "nearest": 2}},
        }
    )
    assert adapt(config) == 0
    report = json.loads((folder / "why/report.json").read_text())
    assert len(report["pictures"]) == 2 and len(list((folder / "why/maps").glob("*.png"))) == 2
    nearest = report["pictures"][0]["nearest"]["nearest training examples to the picture"]
    assert len(nearest) == 2 and nearest[0]["similarity"] >= nearest[1]["similarity"]
    tries = report["pointing"]["tries"]
    assert tries["one object: class"] == tries["one object: word of a caption"] > 0
    assert tries["one object: (guess: any patch)"] == 16 * tries["one object: class"]
    html = (folder / "why/report.html").read_text()
    assert "Pointing game" in html and html.count("data:image/png") > 10
