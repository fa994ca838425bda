"""Which parameters are trained, decayed, and at what rate."""

import pytest

from mmscale.config import ModelConfig, OptimConfig, TextSizes, VisionSizes
from mmscale.errors import UserError
from mmscale.model.presets import build_model, build_model_config
from mmscale.train.optimizer import decays, freeze, layer_scales, parameter_groups


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


def test_layer_decay_falls_towards_the_input(sizes):
    model = build_model(sizes)
    scales = layer_scales([name for name, _ in model.named_parameters()], 0.5)

    def scale(*parts):
        found = {value for name, value in scales.items() if all(part in name for part in parts)}
        assert len(found) == 1, (parts, found)
        return found.pop()

    assert [scale(f"vision.blocks.{i}.") for i in range(3)] == [0.125, 0.25, 0.5]
    assert scale("vision", "patch_embedding") == 0.0625
    assert [scale(f"text.blocks.{i}.") for i in range(2)] == [0.25, 0.5]
    assert scale("text.tokens") == scale("text.positions") == 0.125
    assert scale("logit_scale") == scale("pooler") == scale("decoder.head") == 1.0
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["lr_scale"] for group in groups} == set(scales.values())


def test_frozen_parts_are_left_out_and_unknown_ones_named(sizes):
    model = build_model(sizes)
    freeze(model, ["vision", "text.blocks.0"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith(("vision.", "text.blocks.0.")) for name in trained)
    with pytest.raises(UserError, match=r"train.freeze: the model has no part `visoin`; there are vision, text"):
        freeze(model, ["visoin"])
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(model, ["vision", "text", "decoder", "logit_scale"])
