"""Questions about pictures: the VQA rule, answers as people spell them, and choosing by likelihood."""

import pytest
import torch
import torch.nn.functional as F
from checkpoints import write_checkpoint

from mmscale.config import EvalConfig
from mmscale.evaluate.captioning import generate_captions
from mmscale.evaluate.vqa import QuestionAnswering, normalize_answer, read_questions, vqa_accuracy


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("vqa"))[:2]


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_answers_are_counted_by_the_vqa_rule(agreeing, accuracy):
    answers = ["Two."] * agreeing + ["a dog"] * (10 - agreeing)
    assert vqa_accuracy("2", answers) == pytest.approx(accuracy)


def test_one_known_answer_is_enough():
    assert vqa_accuracy("the circle", ["circle"]) == 1.0
    assert vqa_accuracy("square", ["circle"]) == 0.0


def test_answers_are_compared_without_case_articles_and_punctuation():
    assert normalize_answer("The  Red-dog!") == "red dog"
    assert normalize_answer("three") == "3" == normalize_answer("3.")
    assert normalize_answer("12:30") == "12:30" and normalize_answer("3.5") == "3.5"


def test_questions_are_read_in_both_layouts():
    one = read_questions({"question": "what", "answers": ["a"], "candidates": ["a", "b"]}, 0, "k")
    assert [(q.question, q.answers, q.candidates) for q in one] == [("what", ["a"], ["a", "b"])]
    several = {"questions": [{"question": "q", "answer": "yes"}, {"question": "unanswered"}, "broken"]}
    assert [(q.question, q.answers, q.candidates) for q in read_questions(several, 0, "k")] == [("q", ["yes"], [])]
    assert read_questions({"class_name": "circle"}, 0, "k") == []


@torch.no_grad()
def test_likelihoods_are_those_of_the_answers_tokens_one_by_one(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    task = QuestionAnswering(model, tokenizer, EvalConfig(batch=3))
    pixel_values = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    _, image_tokens = model.encode_image(pixel_values)
    pairs = [(row, "a red circle", answer) for row in (0, 1) for answer in ("two", "small blue square", "")]
    for (row, prompt, answer), found in zip(pairs, task._log_likelihoods(pairs, image_tokens), strict=True):
        ids = torch.tensor([tokenizer.encode(f"{prompt} {answer}", 24)])
        start = len(tokenizer.encode(prompt, 24)) - 1
        logits = model(input_ids=ids, pixel_values=pixel_values[row : row + 1]).logits[0]
        expected = sum(F.log_softmax(logits[t - 1], dim=0)[ids[0, t]] for t in range(start, ids.shape[1]))
        assert found == pytest.approx(float(expected), abs=1e-4), (row, answer)


@torch.no_grad()
def test_a_prompts_length_does_not_change_what_is_written_for_another(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    pixel_values = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    prompts = ["two", "a small red circle above a large blue square"]
    together = generate_captions(model, tokenizer, pixel_values, prompts=prompts)
    for row in (0, 1):
        alone = generate_captions(model, tokenizer, pixel_values[row : row + 1], prompts=prompts[row : row + 1])
        shared = min(len(alone[0]), len(together[row]))  # the longer prompt leaves less room
        assert alone[0][:shared] == together[row][:shared] and shared


def test_a_prompt_that_fills_the_context_is_cut(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    pixel_values = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert generate_captions(model, tokenizer, pixel_values, prompts=["red " * 100])
