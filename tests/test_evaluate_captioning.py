"""Caption scores: those of COCO's scorers on the same tokens, and exact match."""

import json

import pytest
from caption_reference import NUM_CASES, RESULTS, corpus

from mmscale.evaluate.caption_metrics import caption_scores, tokenize
from mmscale.evaluate.captioning import exact_match


def test_scores_equal_cocos_on_200_random_corpora():
    expected = json.loads(RESULTS.read_text())["scores"]
    assert len(expected) == NUM_CASES
    for case, right in enumerate(expected):
        found = caption_scores(*corpus(case))
        assert found.keys() == right.keys()
        for name, value in right.items():
            assert found[name] == pytest.approx(value, abs=1e-6), (case, name)


def test_a_perfect_corpus_scores_one_and_cider_ten():
    captions = ["a small red circle", "two large blue squares on top", "the dogs"]
    scores = caption_scores(captions, [[caption] for caption in captions])
    assert scores["bleu_1"] == pytest.approx(1) and scores["rouge_l"] == pytest.approx(1)
    assert caption_scores(captions[:2], [[caption] for caption in captions[:2]])["cider"] == pytest.approx(10)


def test_tokens_are_lower_case_words_without_punctuation():
    assert tokenize("A dog's ball, (red)... isn't “new”!") == ["a", "dog's", "ball", "red", "isn't", "new"]
    assert tokenize("Été à 3.5 km") == ["été", "à", "3", "5", "km"]
    assert tokenize(" ... ") == []


def test_exact_match_forgives_spacing_and_nothing_else():
    assert exact_match(" a red  circle", ["one", "a red circle"])
    assert not exact_match("a red circle.", ["a red circle"])
    assert not exact_match("A red circle", ["a red circle"])
