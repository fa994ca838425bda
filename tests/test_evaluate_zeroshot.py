"""Zero-shot classification: the counting, and the files that people have for names and templates."""

import numpy as np
import pytest
import torch

from mmscale.errors import UserError
from mmscale.evaluate.zeroshot import Classification, classify, read_lines, read_templates, target_class


def test_top1_top5_and_mean_per_class_are_counted_apart():
    names = list("abcdefg")
    targets = np.array([0, 0, 0, 1])
    ranked = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [2, 3, 4, 5, 6]])
    scores = Classification(names, targets, ranked).scores()
    assert scores == {"zeroshot_top1": 0.5, "zeroshot_top5": 0.75, "zeroshot_mean_per_class": pytest.approx(1 / 3)}


def test_confusion_has_the_right_class_in_rows():
    matrix = Classification(["a", "b"], np.array([0, 0, 1]), np.array([[0], [1], [1]])).confusion()
    assert matrix.tolist() == [[1, 1], [0, 1]]


def test_classes_are_ranked_by_similarity_in_blocks():
    images, classes = torch.randn(50, 8), torch.randn(9, 8)
    expected = (images @ classes.T).argsort(dim=1, descending=True)[:, :5]
    assert torch.equal(classify(images, classes, block=7), expected)


def test_templates_are_read_as_they_go_around(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a bad photo of a {}.\n\n'a photo of many {}.',\n\"a {} in a video game.\",\n")
    assert read_templates(str(path)) == ["a bad photo of a {}.", "a photo of many {}.", "a {} in a video game."]


def test_a_template_without_a_place_for_the_name_is_refused():
    with pytest.raises(UserError, match=r"a photo.*needs exactly one"):
        read_templates(["a photo"])


def test_a_missing_and_an_empty_file_of_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="class names cannot be read"):
        read_lines(tmp_path / "none.txt", "class names")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no class names in this file"):
        read_lines(tmp_path / "empty.txt", "class names")


def test_a_class_outside_the_names_is_refused():
    number = {"circle": 0, "square": 1}
    assert target_class({"class_name": "square"}, number) == 1
    assert target_class({"class_index": 1}, number) == 1
    with pytest.raises(UserError, match="class `star`"):
        target_class({"class_name": "star"}, number)
    with pytest.raises(UserError, match="`class_index` is 2"):
        target_class({"class_index": 2}, number)
