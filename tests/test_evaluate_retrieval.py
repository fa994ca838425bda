"""Retrieval: the ranks of a whole similarity matrix, ties as a fair draw settles them, pairs nobody can confuse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmscale.evaluate import retrieval
from mmscale.evaluate.retrieval import count_above_and_tied, distinct_pairs, retrieval_scores


def whole_matrix_scores(images, texts, image_of_text):
    """Recall and median rank from the whole matrix in float64, one query at a time."""
    similarity = images.double() @ texts.double().T
    ranks = {"image_to_text": [], "text_to_image": []}
    for image in range(len(images)):
        right = similarity[image][image_of_text == image].max()
        ranks["image_to_text"].append(1 + int((similarity[image] > right).sum()))
    for text, image in enumerate(image_of_text.tolist()):
        ranks["text_to_image"].append(1 + int((similarity[:, text] > similarity[image, text]).sum()))
    scores = {}
    for direction, values in ranks.items():
        scores |= {f"{direction}_r{k}": np.mean([rank <= k for rank in values]) for k in (1, 5, 10)}
        scores[f"{direction}_median_rank"] = np.median(values)
    return scores


@pytest.mark.parametrize("blocks", [(1024, 4096), (7, 5)])
def test_blocks_give_the_ranks_of_the_whole_matrix(monkeypatch, blocks):
    monkeypatch.setattr(retrieval, "BLOCK_ROWS", blocks[0])
    monkeypatch.setattr(retrieval, "BLOCK_COLUMNS", blocks[1])
    for case in range(100):
        torch.manual_seed(case)
        num_images = 3 + case % 40
        captions = torch.randint(1, 4, (num_images,))
        image_of_text = torch.repeat_interleave(torch.arange(num_images), captions)[torch.randperm(int(captions.sum()))]
        images = F.normalize(torch.randn(num_images, 8), dim=1)
        texts = F.normalize(images[image_of_text] + 0.7 * torch.randn(len(image_of_text), 8), dim=1)
        expected = whole_matrix_scores(images, texts, image_of_text)
        found = retrieval_scores(images, texts, image_of_text)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-9), (case, name)


def test_a_model_that_gives_everything_one_embedding_scores_chance():
    same = F.normalize(torch.ones(200, 16), dim=1)
    scores = retrieval_scores(same, same, torch.arange(200))
    assert scores["image_to_text_r1"] == pytest.approx(1 / 200)
    assert scores["text_to_image_r10"] == pytest.approx(10 / 200)
    assert scores["image_to_text_median_rank"] == pytest.approx(100.5)


def test_a_tie_counts_as_often_as_a_shuffle_would_find_it():
    rng = np.random.default_rng(0)
    above, tied, right, k = 2, 4, 2, 5
    draws = [(rng.permutation(tied + right)[: k - above] < right).any() for _ in range(20_000)]
    found = retrieval._hit_probability(*(np.array([value]) for value in (above, tied, right)), k)
    assert found[0] == pytest.approx(np.mean(draws), abs=0.01)


def test_a_caption_equal_to_another_pictures_ties_with_it():
    images = torch.eye(3)
    texts = torch.stack([images[0], images[0], images[2]])  # the caption of picture 1 is that of picture 0
    above, tied, right = count_above_and_tied(images, texts, torch.arange(3))["image_to_text"]
    assert (above.tolist(), tied.tolist(), right.tolist()) == ([0, 0, 0], [1, 2, 0], [1, 1, 1])


def test_pairs_that_share_any_caption_are_taken_once():
    captions = [["A red circle", "one red circle"], ["a blue square"], ["One red  circle"], [], ["a dog"], ["a cat"]]
    assert distinct_pairs(captions) == [0, 1, 4, 5]
    assert distinct_pairs(captions, limit=3) == [0, 1, 4]
