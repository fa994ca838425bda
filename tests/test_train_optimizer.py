"""Which parameters are trained, decayed, and at what rate."""

import pytest

from mmscale.config import ModelConfig, OptimConfig, TextSizes, VisionSizes
from mmscale.errors import UserError
from mmscale.model.presets import build_model, build_model_config
from mmscale.train.optimizer import decays, freeze, layer_depths, parameter_groups


@pytest.fixture(scope="module")
def sizes():
    vision = VisionSizes(image_size=32, width=32, layers=3, pooler_queries=5)
    return build_model_config(ModelConfig(embed_dim=32, vision=vision, text=TextSizes(width=32, layers=2)), 300)


def test_only_matrices_of_layers_decay(sizes):
    model = build_model(sizes)
    decayed = {name for name, p in model.named_parameters() if decays(name, tuple(p.shape))}
    kept = {name for name, _ in model.named_parameters()} - decayed
    assert any("qkv.weight" in name for name in decayed) and any("mlp.up.weight" in name for name in decayed)
    for word in ("bias", "norm", "position", "cls_token", "queries", "logit_scale"):
        assert any(word in name for name in kept), word
        assert not any(word in name and "norm" not in name for name in decayed), word
    assert not any("norm" in name.rsplit(".", 2)[-2] for name in decayed)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_depth_grows_towards_the_input_and_sets_rate_and_start(sizes):
    model = build_model(sizes)
    depths = layer_depths([name for name, _ in model.named_parameters()])

    def depth(*parts):
        found = {value for name, value in depths.items() if all(part in name for part in parts)}
        assert len(found) == 1, (parts, found)
        return found.pop()

    assert [depth(f"vision.blocks.{i}.") for i in range(3)] == [3, 2, 1]
    assert depth("vision", "patch_embedding") == 4
    assert [depth(f"text.blocks.{i}.") for i in range(2)] == [2, 1]
    assert depth("text.tokens") == depth("text.positions") == 3
    assert depth("logit_scale") == depth("pooler") == depth("decoder.head") == 0
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5, unfreeze_every=100))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {(group["lr_scale"], group["starts_at"]) for group in groups} == {
        (0.5**depth, 100 * depth) for depth in set(depths.values())
    }


def test_muon_steps_the_matrices_inside_blocks_and_nothing_else(sizes):
    model = build_model(sizes)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(name="muon", lr=0.001, muon_lr=0.02))
    muon = {names[p] for group in groups if group["use_muon"] for p in group["params"]}
    assert {name.split(".")[0] for name in muon} == {"vision", "text", "decoder"}
    assert all("blocks." in name and name.endswith("weight") and model.get_parameter(name).dim() == 2 for name in muon)
    assert not muon & {"text.tokens.weight", "decoder.head.weight", "vision.patch_embedding.weight"}
    assert {group["lr_scale"] for group in groups if group["use_muon"]} == {20.0}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_frozen_parts_are_left_out_and_unknown_ones_named(sizes):
    model = build_model(sizes)
    freeze(model, ["vision", "text.blocks.0"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith(("vision.", "text.blocks.0.")) for name in trained)
    with pytest.raises(UserError, match=r"train.freeze: the model has no part `visoin`; there are vision, text"):
        freeze(model, ["visoin"])
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(model, ["vision", "text", "decoder", "logit_scale"])
