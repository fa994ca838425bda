"""Heads on a pretrained model: what is learned, what stays as it was, what is chosen, and what is left on disk."""

import json
import random

import pytest
import torch
from adapting import adapt_config
from checkpoints import write_checkpoint
from ranks import run_ranks

from mmscale.adapt.heads import tune_heads
from mmscale.adapt.matching import alternatives, swap_word
from mmscale.checkpoint import Checkpoint, committed
from mmscale.data.toy import make_toy
from mmscale.errors import UserError
from mmscale.pretrained import load_pretrained
from mmscale.weights import ADAPTER

HEADS = {
    "shape": {"kind": "classification", "label": "class_name", "class_weights": "balanced"},
    "colors": {"kind": "multilabel", "label": "objects[*].color", "fusion": "gated", "hidden": 8},
    "number": {"kind": "regression", "label": "length(objects)", "fusion": "concat"},
}
MATCH = {"match": {"kind": "matching", "swaps": [["small", "large"], ["above", "below"], ["red", "blue", "green"]]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Toy shards, and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("adapt")
    make_toy(folder / "data", samples=48, shards=4, val_samples=24)
    write_checkpoint(folder / "base")
    return folder


def config(base, name, steps=2, heads=HEADS, **sections):
    own = {"adapt": {"method": "heads", "heads": heads}, "optim": {"lr": 1e-3}}
    return adapt_config(base, name, own, sections, steps=steps, batch=16)


def lines(base, name, file="metrics.jsonl"):
    return [json.loads(line) for line in (base / name / file).read_text().splitlines()]


@pytest.mark.slow
def test_any_shape_gives_the_same_curve(base):
    assert tune_heads(config(base, "alone")) == 0
    persistent = {f"stage3_{key}": 0 for key in ("param_persistence_threshold", "max_live_parameters")}
    shapes = {
        "accumulated": {"train": {"samples": 32, "global_batch": 16, "micro_batch": 4, "zero_stage": 2}},
        "sharded": {
            "train": {"samples": 32, "global_batch": 16, "micro_batch": 4, "zero_stage": 3},
            "deepspeed": {"zero_optimization": persistent},
        },
    }
    assert tune_heads(config(base, "accumulated", **shapes["accumulated"])) == 0
    assert run_ranks(2, tune_heads, config(base, "sharded", **shapes["sharded"])) == [0, 0]
    names = ["loss", "loss_shape", "loss_colors", "loss_number", "grad_norm"]
    expected = [[line[name] for name in names] for line in lines(base, "alone")]
    assert len(expected) == 2 and all(value > 0 for value in expected[0])
    for name in shapes:
        found = [[line[key] for key in names] for line in lines(base, name)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_adapters_move_alone_and_are_added_to_what_they_adapt(base):
    few = {"shape": HEADS["shape"]}
    lora = {"init_from": str(base / "base"), "lora": {"rank": 2}}
    assert tune_heads(config(base, "lora", heads=few, model=lora, optim={"lr": 1e-2})) == 0
    checkpoint, before = Checkpoint.open(base / "lora"), load_pretrained(base / "base").model
    plain = dict(before.named_parameters())
    for name in checkpoint.names("param"):
        stored = name.replace(".base_layer.", ".")
        if ADAPTER not in name and not name.startswith("heads."):
            assert torch.equal(checkpoint.read(name), plain[stored]), name
    adapted = load_pretrained(base / "lora").model
    layer = "vision.blocks.0.attention.qkv"
    a, b = (checkpoint.read(f"{layer}.lora_{part}.default.weight") for part in "AB")
    assert b.abs().max() > 0
    expected = plain[f"{layer}.weight"] + 8.0 / 2 * b @ a
    torch.testing.assert_close(adapted.get_parameter(f"{layer}.weight"), expected)


@pytest.mark.slow
def test_peft_loads_the_adapters_over_the_base(base):
    from peft import PeftModel

    from mmscale.export.peft import export_peft

    lora = {"init_from": str(base / "base"), "lora": {"rank": 2}}
    tune_heads(config(base, "peft_run", steps=1, heads={"shape": HEADS["shape"]}, model=lora, optim={"lr": 1e-2}))
    export_peft(base / "peft_run", base / "peft")
    bare, merged = load_pretrained(base / "base").model, load_pretrained(base / "peft_run").model
    pixel_values = torch.rand(2, 3, 32, 32)
    before = bare.get_image_features(pixel_values)
    after = PeftModel.from_pretrained(bare, str(base / "peft")).get_image_features(pixel_values)
    torch.testing.assert_close(after, merged.get_image_features(pixel_values))
    assert (after - before).abs().max() > 1e-4
    with pytest.raises(UserError, match=r"this run has no adapters \(model.lora\)"):
        export_peft(base / "base", base / "nothing")


def test_only_what_is_chosen_is_trained(base):
    adapt = {"method": "heads", "heads": MATCH, "trainable": ["decoder.norm_final"], "top_blocks": 1}
    assert tune_heads(config(base, "chosen", adapt=adapt)) == 0
    before = dict(load_pretrained(base / "base").model.named_parameters())
    after = dict(load_pretrained(base / "chosen").model.named_parameters())
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert any(name.startswith("text.blocks.1.") for name in moved) and "decoder.norm_final.weight" in moved
    assert not any(".blocks.0." in name or "patch" in name or "tokens" in name for name in moved)
    with pytest.raises(UserError, match="the model has no part `txt`"):
        tune_heads(config(base, "wrong", adapt={"method": "heads", "heads": MATCH, "trainable": ["txt"]}))


def test_a_tower_is_unfrozen_from_its_top(base):
    """Blocks at depth 2 learn from the 32nd sample on, what is before the blocks from the 48th on."""
    assert tune_heads(config(base, "thawed", steps=3, optim={"lr": 1e-2, "unfreeze_every": 16})) == 0
    before = dict(load_pretrained(base / "base").model.named_parameters())
    after = dict(load_pretrained(base / "thawed").model.named_parameters())
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {"vision.blocks.1.attention.qkv.weight", "vision.blocks.0.attention.qkv.weight"} <= moved
    assert not moved & {"vision.patch_embedding.weight", "vision.positions", "text.tokens.weight"}


def test_the_best_on_dev_is_kept_and_reported_on_test(base):
    """Seven evaluations at a rate that ruins the model: the best is not the last."""
    data = {
        **config(base, "best").data.model_dump(include={"train", "workers", "crop_scale", "crop_ratio"}),
        "val": str(base / "data/val-00000.tar"),
    }
    make_toy(base / "test", samples=1, shards=1, seed=1, val_samples=30)
    data["test"] = str(base / "test/val-00000.tar")
    adapt = {"method": "heads", "heads": HEADS | MATCH, "choose_by": "number_r2", "patience": 2}
    sections = {"adapt": adapt, "data": data, "eval": {"every": 16}, "run": {"dir": str(base / "best"), "keep_last": 1}}
    assert tune_heads(config(base, "best", steps=9, optim={"lr": 5e-2, "schedule": "constant"}, **sections)) == 0
    scores = [line["number_r2"] for line in lines(base, "best", "evaluations.jsonl")]
    best = scores.index(max(scores)) + 1
    assert len(scores) == min(9, best + 2)
    folders = [folder.name for folder in committed(base / "best/checkpoints")]
    assert folders == sorted({f"step_{best:08d}", f"step_{len(scores):08d}"})
    assert load_pretrained(base / "best").step == best
    report = json.loads((base / "best/report.json").read_text())
    assert report["checkpoint"] == f"step_{best:08d}"
    assert set(report["tasks"]["shape"]["per_class"]) >= {"circle", "macro avg"}
    assert report["tasks"]["match"]["num_samples"] == 30
    assert {"match_auc", "match_reranked_image_to_text_r1", "colors_mean_ap", "shape_accuracy"} <= set(report["scores"])
    assert (base / "best/confusion_shape.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_best_is_known_after_a_resume(base):
    """Without `choose_by` it is the first score; evaluations that a checkpoint covers are not made again."""
    sections = {
        "heads": {"number": HEADS["number"]},
        "data": {"train": str(base / "data/train-*.tar"), "val": str(base / "data/val-00000.tar"), "workers": 0},
        "eval": {"every": 16},
        "optim": {"lr": 5e-2, "schedule": "constant"},
    }
    assert tune_heads(config(base, "goes_on", steps=2, **sections)) == 0
    assert tune_heads(config(base, "goes_on", steps=4, **sections)) == 0
    scores = [line["number_r2"] for line in lines(base, "goes_on", "evaluations.jsonl")]
    assert len(scores) == 4
    assert load_pretrained(base / "goes_on").step == scores.index(max(scores)) + 1
    unknown = {"adapt": {"method": "heads", "heads": sections["heads"], "choose_by": "number_r3"}}
    with pytest.raises(UserError, match=r"adapt\.choose_by: there is no score `number_r3`; there are number_r2"):
        tune_heads(config(base, "goes_on", steps=5, **(sections | unknown)))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"heads": {}}, "adapt.heads: names no task"),
        ({"heads": {"x": {"kind": "classification"}}}, "adapt.heads.x.label: is required"),
        ({"heads": {"x": {"kind": "classification", "label": "a["}}}, "`a\\[` is not a JMESPath expression"),
        ({"heads": {"x": {"kind": "classification", "label": "color"}}}, "gives 0 class"),
        ({"heads": {"x": {"kind": "regression", "label": "class_name"}}}, "gives no number"),
        ({"heads": {"x": {**HEADS["shape"], "classes": ["circle", "disc"]}}}, "no training sample is a `disc`"),
        ({"heads": {"x": {"kind": "matching", "fusion": "image"}}}, "sees only one of the two"),
        ({"data": {"train": "{b}/data/train-*.tar", "val": "{b}/data/train-00001.tar"}}, "splits must not mix"),
        ({"model": {"init_from": None}}, "model.init_from: not set"),
        ({"model": {"init_from": "{b}/base", "text": {"width": 64}}}, "model.text.width: 64, but the base"),
        ({"adapt": {"method": "heads", "heads": HEADS, "patience": 1}}, "need eval.every"),
    ],
)
def test_mistakes_are_named(base, sections, words):
    text = json.dumps(sections).replace("{b}", str(base))
    with pytest.raises(UserError, match=words):
        tune_heads(config(base, "mistake", **json.loads(text)))


def test_a_swapped_word_makes_another_statement():
    choices = alternatives([["red", "blue"], ["small", "large"], ["alone"]])
    draw = random.Random(0)
    swapped = {swap_word("a small red circle alone", choices, draw) for _ in range(50)}
    assert swapped == {"a large red circle alone", "a small blue circle alone"}
    assert swap_word("a circle alone", choices, draw) is None
    with pytest.raises(UserError, match="`red` stands in two lists"):
        alternatives([["red", "blue"], ["red", "green"]])


def test_gradients_are_those_of_the_loss(base):
    """Finite differences in double precision, along the gradient of one tensor of each part."""
    from mmscale.adapt.base import adapted_model, complete, load_base
    from mmscale.adapt.config import HeadTask
    from mmscale.adapt.heads import find_answers
    from mmscale.adapt.matching import Matching
    from mmscale.adapt.objective import AdaptationObjective
    from mmscale.adapt.predictions import Prediction
    from mmscale.adapt.tuning import open_split
    from mmscale.data.batches import LabelledBatch

    settings = config(base, "gradients", heads=HEADS | MATCH)
    found = find_answers(settings)
    pretrained = load_base(settings)
    settings = complete(settings, pretrained, heads={name: head for name, (head, _) in found.items()})
    model, tokenizer = adapted_model(settings, pretrained, pretrained.tokenizer).double(), pretrained.tokenizer
    # Matching comes first: what it encodes without a gradient, the others would be given.
    tasks = [Matching("match", HeadTask(**MATCH["match"]), tokenizer, 24, 0)]
    tasks += [Prediction(name, HeadTask(**task), *found[name]) for name, task in HEADS.items()]
    batch = next(iter(open_split(settings, model, tokenizer, settings.data.train)))
    batch = LabelledBatch(**vars(batch), sources=[0] * len(batch.keys))
    inputs = [task.prepare(batch) for task in tasks]
    objective, counts = AdaptationObjective(model, tasks), torch.tensor([float(each["count"]) for each in inputs])
    given = [{name: tensor for name, tensor in each.items() if name != "count"} for each in inputs]

    def loss():
        return objective(batch.pixel_values, batch.input_ids, batch.lengths, inputs=given, counts=counts)[0]

    loss().backward()
    parts = ["vision.patch_embedding.weight", "text.blocks.0.attention.qkv.weight", "decoder.head.weight"]
    for name in [*parts, "text.tokens.weight", "heads.number.match.weight", "heads.match.likelihood.weight"]:
        parameter = model.get_parameter(name)
        direction, step = parameter.grad / parameter.grad.norm(), 3e-4
        with torch.no_grad():
            ends = [loss() for shift in (step, -2 * step) if parameter.add_(shift * direction) is not None]
            parameter.add_(step * direction)
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(slope.double(), parameter.grad.norm(), rtol=2e-2, atol=1e-3)
