"""Several models made the most of: soups, ensembles, 8-bit weights, distillation."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from checkpoints import SMALL, write_checkpoint
from small_split import write_shard

from mmscale.adapt.combine.distill import Teacher, build_student, distillation_tasks, with_teacher_settings
from mmscale.adapt.combine.ensemble import Embedded, Truth, choose_weights, ensemble_scores
from mmscale.adapt.combine.soup import greedy_recipe, mean_weights
from mmscale.adapt.combine.sources import write_model
from mmscale.adapt.command import adapt
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.objective import AdaptationObjective, forward_backward
from mmscale.adapt.tuning import open_split
from mmscale.data.batches import LabelledBatch
from mmscale.errors import UserError
from mmscale.evaluate.captioning import generate_captions
from mmscale.evaluate.retrieval import retrieval_scores
from mmscale.model.int8 import Int8Embedding, Int8Linear, int8_weights, quantize_rows
from mmscale.pretrained import load_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three runs `run0` to `run2` of the same sizes and tokenizer, one that is larger, and a split."""
    folder = tmp_path_factory.mktemp("combine")
    for number in range(3):
        write_checkpoint(folder / f"run{number}", step=3 + number)
    write_checkpoint(folder / "larger", model=SMALL | {"embed_dim": 64})
    write_shard(folder / "val.tar")
    return folder


def make_config(folder, out, method, split="val", **sections):
    raw = {
        "run": {"dir": str(folder / out)},
        "data": {split: str(folder / "val.tar"), "workers": 0, "max_bad_fraction": 1.0},
        "adapt": {"method": method},
        "eval": {"tasks": ["retrieval", "zeroshot"], "batch": 8},
    }
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return AdaptConfig.model_validate(raw)


# --- soups --------------------------------------------------------------------------------------------------------


def test_the_mean_of_weights_does_not_depend_on_their_order():
    models = [{"a": torch.randn(2000) * 10**power} for power in (0, 1, 2, 0, 1)]
    for shifted in (models[1:] + models[:1], models[::-1]):
        assert torch.equal(mean_weights(models)["a"], mean_weights(shifted)["a"])
    torch.testing.assert_close(mean_weights(models)["a"], sum(model["a"] for model in models) / 5)


def test_the_greedy_recipe_starts_from_the_best_and_keeps_what_does_no_harm():
    models = [{"a": torch.tensor([value])} for value in (0.0, 4.0, 1.0, 3.0)]

    def score(weights):  # best at 2
        return -abs(float(weights["a"]) - 2)

    singles = [-2.0, -2.0, -1.0, -1.0]
    # 1 alone; with 3 it is 2, the best there is; 0 and 4 then spoil it.
    assert greedy_recipe(models, singles, score) == ([2, 3], 0.0)
    assert greedy_recipe(models, [-2.0, -9.0, -9.0, -9.0], lambda weights: -3.0) == ([0], -2.0)
    assert greedy_recipe(models, [0.0] * 4, lambda weights: 0.0)[0] == [0, 1, 2, 3]


def test_a_soup_is_a_run_that_loads_and_holds_the_mean(folder):
    names = [str(folder / f"run{number}") for number in range(3)]
    config = make_config(
        folder,
        "soup",
        "soup",
        data={"val": str(folder / "val.tar"), "test": str(folder / "val.tar")},
        adapt={"method": "soup", "soup": {"models": names, "recipe": "uniform"}},
    )
    assert adapt(config) == 0
    found = load_pretrained(folder / "soup", device="cpu")
    weights = [load_pretrained(name, device="cpu").model.state_dict() for name in names]
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, mean_weights(weights)[name]), name
    report = json.loads((folder / "soup" / "report.json").read_text())
    assert report["models"] == names and set(report["test"]) == {*names, "soup"}
    with pytest.raises(UserError, match="holds a model already"):
        adapt(config)


def test_weights_of_an_exported_folder_become_a_run_too(folder):
    exported = replace(load_pretrained(folder / "run0", device="cpu"), run=None, step=None, samples=None)
    config = make_config(folder, "rewritten", "soup", model={"init_from": "an export"})
    write_model(config, exported, exported.model.state_dict(), {})
    found = load_pretrained(folder / "rewritten", device="cpu")
    assert found.model.config.to_dict() == exported.model.config.to_dict()
    assert torch.equal(found.model.text.tokens.weight, exported.model.text.tokens.weight)


@pytest.mark.parametrize(
    ("models", "score", "message"),
    [
        (["run0"], None, "1 model.*at least two"),
        (["run0", "larger"], None, "other shapes in .*larger"),
        (["run0", "run1"], ["retrieval_r1"], r"`retrieval_r1` is not among .*retrieval_image_to_text_r1"),
        (["run0", "run1"], ["retrieval_image_to_text_median_rank"], "median_rank` is not among"),
    ],
)
def test_a_soup_that_cannot_be_made_is_refused(folder, models, score, message):
    soup = {"models": [str(folder / name) for name in models]} | ({"score": score} if score else {})
    with pytest.raises(UserError, match=message):
        adapt(make_config(folder, "refused", "soup", adapt={"method": "soup", "soup": soup}))


# --- ensembles ----------------------------------------------------------------------------------------------------


def random_model(seed, dim, samples=200):
    generator = torch.Generator().manual_seed(seed)
    images, noise = (torch.randn(samples, dim, generator=generator) for _ in range(2))
    embeds = (torch.nn.functional.normalize(x, dim=1) for x in (images, images + noise))
    return Embedded(*embeds, None, scale=5.0 * seed)


def test_an_ensemble_ranks_by_the_weighted_sum_of_logits():
    models, weights = [random_model(1, 8), random_model(2, 16)], [0.7, 0.3]
    truth = Truth(list(range(200)), [], [], [])
    logits = sum(
        weight * model.scale * model.images @ model.texts.T for weight, model in zip(weights, models, strict=True)
    )
    above = (logits > logits.diagonal()[:, None]).sum(1)
    found = ensemble_scores(models, weights, truth)
    for count in (1, 5, 10):
        assert found[f"retrieval_image_to_text_r{count}"] == pytest.approx(float((above < count).float().mean()))
    alone = ensemble_scores(models, [1.0, 0.0], truth)
    own = retrieval_scores(models[0].images, models[0].texts, torch.arange(200))
    assert alone == {f"retrieval_{name}": value for name, value in own.items()}
    assert 0.1 < own["image_to_text_r1"] < found["retrieval_image_to_text_r1"] < 1


def test_weights_are_found_by_adding_what_helps_most():
    def score(weights):
        return -abs(weights[0] - 2 / 3) - abs(weights[2] - 1 / 3)

    assert choose_weights(3, score, rounds=6) == pytest.approx([2 / 3, 0, 1 / 3])
    assert choose_weights(2, lambda weights: 0.0, rounds=6) == [1, 0]  # no more models than are of use


def test_an_ensemble_takes_models_of_any_sizes(folder):
    names = [str(folder / "run0"), str(folder / "larger")]
    config = make_config(folder, "ensemble", "ensemble", adapt={"method": "ensemble", "ensemble": {"models": names}})
    assert adapt(config) == 0
    report = json.loads((folder / "ensemble" / "report.json").read_text())
    assert sum(report["weights"].values()) == pytest.approx(1)
    scores = report["dev"]
    assert "zeroshot_top1" in scores["ensemble"]

    def chosen_by(name):
        return sum(scores[name][score] for score in report["score"])

    assert chosen_by("ensemble") >= max(map(chosen_by, names))


# --- 8-bit weights ------------------------------------------------------------------------------------------------


def test_rows_are_rounded_to_a_127th_of_their_largest_magnitude():
    weight = torch.randn(6, 30) * torch.tensor([1e-6, 1e-3, 1, 10, 1e4, 0])[:, None]
    numbers, scale = quantize_rows(weight)
    assert numbers.dtype == torch.int8 and int(numbers.abs().max()) == 127
    assert bool(((numbers * scale[:, None] - weight).abs() <= scale[:, None] * 0.501).all())


@pytest.mark.parametrize("bytes_are_multiplied", [True, False])
def test_an_8_bit_layer_is_near_its_original_and_a_token_does_not_depend_on_its_batch(
    monkeypatch, bytes_are_multiplied
):
    monkeypatch.setattr("mmscale.model.int8._multiplies_bytes", lambda x: bytes_are_multiplied)
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96)
    layer = Int8Linear(linear)
    layer.weight_int8, layer.weight_scale = quantize_rows(linear.weight.detach())
    x = torch.randn(3, 5, 64)
    x[0] *= 1000
    with torch.no_grad():
        found, expected = layer(x), linear(x)
        # To rounding where floating-point products are summed in another order for another number of rows.
        torch.testing.assert_close(layer(x[1:2]), found[1:2], rtol=0, atol=0 if bytes_are_multiplied else 1e-5)
    error = (found - expected).flatten(0, 1).norm(dim=1) / expected.flatten(0, 1).norm(dim=1)
    assert float(error.max()) < 0.015


def test_gradients_pass_through_an_8_bit_layer():
    linear = torch.nn.Linear(8, 4)
    layer = Int8Linear(linear)
    layer.weight_int8, layer.weight_scale = quantize_rows(linear.weight.detach())
    x = torch.randn(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, linear.weight.sum(0).expand(2, -1), atol=0.05, rtol=0)


def test_a_quantized_model_is_a_folder_a_quarter_of_the_size_that_loads_as_any_other(folder):
    config = make_config(
        folder,
        "int8",
        "quantize",
        model={"init_from": str(folder / "run0")},
        adapt={"method": "quantize", "quantize": {"batch": 2, "repeats": 1}},
    )
    assert adapt(config) == 0  # it is loaded by stock calls on the way
    base, small = load_pretrained(folder / "run0", device="cpu"), load_pretrained(folder / "int8", device="cpu")
    report = json.loads((folder / "int8" / "report.json").read_text())
    assert report["bytes"]["int8"] / report["bytes"]["fp32"] < 0.4  # norms and positions are much of so small a model
    assert isinstance(small.model.text.tokens, Int8Embedding) and isinstance(small.model.decoder.head, Int8Linear)
    pictures = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        cosine = (base.model.get_image_features(pictures) * small.model.get_image_features(pictures)).sum(1)
    assert float(cosine.min()) > 0.999
    assert len(generate_captions(small.model, small.tokenizer, pictures)) == 4
    with pytest.raises(UserError, match="8-bit weights already"):
        adapt(make_config(folder, "again", "quantize", model={"init_from": str(folder / "int8")}))


# --- distillation -------------------------------------------------------------------------------------------------


def distill_config(folder, out="student", **settings):
    sizes = {"vision": SMALL["vision"] | {"image_size": None}, "text": SMALL["text"] | {"context_length": None}}
    return make_config(
        folder,
        out,
        "distill",
        split="train",
        model={"preset": "tiny", **sizes, "decoder": SMALL["decoder"]},
        adapt={"method": "distill", "distill": {"teacher": str(folder / "run1"), "bank": 16, **settings}},
        train={"samples": 16, "global_batch": 8, "zero_stage": 0},
    )


@pytest.fixture(scope="module")
def lesson(folder):
    """A configuration, a teacher, a fresh student of the same sizes, and a batch in which a slot is masked."""
    teacher = load_pretrained(folder / "run1", device="cpu")
    config = with_teacher_settings(distill_config(folder), teacher)
    student = build_student(config, teacher.tokenizer, teacher.model)
    split = open_split(config, student, teacher.tokenizer, config.data.train)
    batch = next(iter(split))
    assert batch.valid.tolist() == [True] * 7 + [False]
    return config, teacher, student, LabelledBatch(**vars(batch), sources=[0] * 8)


def gradients(config, teacher, model, micro_batches):
    objective = AdaptationObjective(model, distillation_tasks(config, Teacher(teacher, config), teacher.tokenizer))
    objective.zero_grad()
    losses = forward_backward(objective, micro_batches, lambda loss: loss.backward())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def part(batch, rows):
    columns = vars(batch)
    return LabelledBatch(
        **{name: value if name == "bad" else value[rows] for name, value in columns.items()},
    )


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(lesson):
    config, teacher, _, batch = lesson
    same = copy.deepcopy(teacher.model).requires_grad_(True)
    config = config.model_copy(deep=True)
    config.adapt.distill.hard_captions = 0
    losses, found = gradients(config, teacher, same, [batch])
    for name in ("loss_embeddings", "loss_contrastive", "loss_captions"):
        assert abs(float(losses[name])) < 1e-5, name
    assert max(float(gradient.abs().max()) for gradient in found.values()) < 1e-3


def test_distillation_has_one_gradient_for_any_micro_batches_and_leaves_masked_rows_out(lesson):
    config, teacher, student, batch = lesson
    whole_losses, whole = gradients(config, teacher, student, [batch])
    halves_losses, halves = gradients(config, teacher, student, [part(batch, slice(0, 4)), part(batch, slice(4, 8))])
    good_losses, good = gradients(config, teacher, student, [part(batch, slice(0, 7))])
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for losses, other in ((halves_losses, halves), (good_losses, good)):
        assert losses.keys() == whole_losses.keys()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, whole_losses[name])
        for name, gradient in other.items():
            assert float((gradient - whole[name]).abs().max()) < 1e-5 * largest, name


def test_the_teacher_is_no_part_of_what_is_trained(lesson):
    config, teacher, student, batch = lesson
    objective = AdaptationObjective(student, distillation_tasks(config, Teacher(teacher, config), teacher.tokenizer))
    assert not {id(p) for p in objective.parameters()} & {id(p) for p in teacher.model.parameters()}
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training
    _, found = gradients(config, teacher, student, [batch])
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained and not any(name.startswith("logit_scale") for name in trained)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"embeddings": 0, "contrastive": 0, "captions": 0, "hard_captions": 0}, "all weights are 0"),
        ({"teacher": None}, "teacher: is required"),
    ],
)
def test_distillation_without_a_teacher_or_a_loss_is_refused(folder, sections, message):
    with pytest.raises(UserError, match=message):
        adapt(distill_config(folder, "refused", **sections))


def test_a_student_is_trained_saved_and_loaded_as_any_run(folder):
    config = distill_config(folder)
    config.data.test = config.data.train
    assert adapt(config) == 0
    report = json.loads((folder / "student" / "report.json").read_text())
    assert set(report["test"]) == {"teacher", "student"} and report["share"] == pytest.approx(1, abs=0.1)
    found = load_pretrained(folder / "student", device="cpu")
    teacher = load_pretrained(folder / "run1", device="cpu")
    assert found.tokenizer.fingerprint == teacher.tokenizer.fingerprint
    assert torch.equal(found.model.logit_scale.log_scale, teacher.model.logit_scale.log_scale)


def test_8_bit_weights_cannot_be_trained_on(folder):
    base = load_pretrained(folder / "run0", device="cpu")
    assert {name for name in int8_weights(base.model) if name.endswith("weight_int8")}
    from mmscale.export.initial import _check_shapes

    with pytest.raises(UserError, match="holds nothing for"):
        _check_shapes("int8", int8_weights(base.model), base.model)
