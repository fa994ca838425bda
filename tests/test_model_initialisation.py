"""Every module starts at the scale that it asks for."""

import pytest

from mmscale.config import ModelConfig
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.presets import build_model, build_model_config


def test_linear_layers_of_blocks_and_heads_start_at_their_own_scale():
    """Transformers passes over modules of custom models that hold no parameters themselves: blocks, for one."""
    heads = {"match": {"kind": "matching", "fusion": "cross_attention", "likelihood": True}}
    model = build_model(build_model_config(ModelConfig(heads=heads), 320))
    block = model.vision.blocks[0]
    assert float(block.attention.qkv.weight.std()) == pytest.approx(128**-0.5, rel=0.02)
    assert float(block.attention.out.weight.std()) == pytest.approx((2 * 4 * 128) ** -0.5, rel=0.02)
    assert float(block.mlp.down.weight.std()) == pytest.approx((2 * 4 * 128) ** -0.5, rel=0.02)
    assert float(block.attention.qkv.bias.abs().max()) == float(block.mlp.up.bias.abs().max()) == 0
    assert model.heads["match"].likelihood.weight.tolist() == [[0.5, 0.5]]


def test_loaded_weights_are_not_initialised_again(tmp_path):
    model = build_model(build_model_config(ModelConfig(), 320))
    model.save_pretrained(tmp_path)
    again = MMScaleModel.from_pretrained(tmp_path)
    assert all((again.get_parameter(name) == value).all() for name, value in model.named_parameters())
