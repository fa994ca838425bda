"""The image tower's trunk is the same function as Transformers' CLIP and SigLIP towers, both ways."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from mmscale.config import ModelConfig, VisionSizes
from mmscale.errors import UserError
from mmscale.export.clip_vision import read_trunk, to_clip_vision, trunk_settings, with_trunk_settings
from mmscale.model import MMScaleConfig, MMScaleModel
from mmscale.model.presets import build_model_config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


def stock_trunk(kind: str, folder):
    torch.manual_seed(0)
    config, model = {
        "clip": (CLIPVisionConfig(**SIZES), CLIPVisionModel),
        "clip-gelu": (CLIPVisionConfig(**SIZES, hidden_act="gelu"), CLIPVisionModel),
        "siglip": (SiglipVisionConfig(**SIZES), SiglipVisionModel),
    }[kind]
    trunk = model(config).eval()
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    trunk.save_pretrained(folder)
    return trunk


def our_config(folder, **sizes) -> MMScaleConfig:
    model = ModelConfig(embed_dim=16, vision=VisionSizes(init_from=str(folder), pooler_heads=2, **sizes))
    return build_model_config(with_trunk_settings(model), vocab_size=50)


@pytest.mark.parametrize("kind", ["clip", "clip-gelu", "siglip"])
@torch.no_grad()
def test_a_stock_trunk_gives_the_same_outputs_here(kind, tmp_path):
    stock = stock_trunk(kind, tmp_path)
    config = our_config(tmp_path)
    model = MMScaleModel(config).eval()
    missing, unexpected = model.load_state_dict(read_trunk(tmp_path, config), strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("vision.") and "pool" not in name and "proj" not in name]
    pictures = torch.randn(3, 3, 24, 24)
    expected = stock(pictures).last_hidden_state
    ours = model.vision.trunk(pictures)
    if kind == "siglip":  # its last hidden state has passed the norm that is our pooler's
        ours = model.vision.pooler.norm_context(ours)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_our_trunk_gives_the_same_outputs_as_a_stock_clip_vision_model():
    torch.manual_seed(0)
    vision = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 2, "heads": 4, "mlp_ratio": 2.5}
    model = MMScaleModel(MMScaleConfig(vision | {"pooler_heads": 2}, {"layers": 1}, {"layers": 0}, embed_dim=16)).eval()
    stock = to_clip_vision(model.state_dict(), model.config)
    pictures = torch.randn(3, 3, 24, 24)
    output = stock(pictures)
    expected = model.vision.trunk(pictures)
    assert (output.last_hidden_state - expected).abs().max() <= 1e-5 * expected.abs().max()
    pooled = model.vision.pooler.norm_context(expected[:, 0])
    assert (output.pooler_output - pooled).abs().max() <= 1e-5 * pooled.abs().max()


def test_positions_are_interpolated_to_another_resolution(tmp_path):
    stock_trunk("clip", tmp_path)
    config = our_config(tmp_path, image_size=40)
    positions = read_trunk(tmp_path, config)["vision.positions"]
    assert positions.shape == (26, 32)


def test_what_the_user_sets_stays_and_the_rest_comes_from_the_folder(tmp_path):
    stock_trunk("siglip", tmp_path)
    settings = trunk_settings(tmp_path)
    assert settings["activation"] == "gelu_tanh" and not settings["class_token"]
    config = our_config(tmp_path, image_size=48)
    assert config.vision_config.image_size == 48
    assert (config.vision_config.width, config.vision_config.layer_norm_eps) == (32, 1e-6)


def test_other_folders_and_sizes_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        trunk_settings(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="bert"):
        trunk_settings(tmp_path)
    stock_trunk("clip", tmp_path)
    with pytest.raises(UserError, match="asks for"):
        read_trunk(tmp_path, our_config(tmp_path, width=64))
    with pytest.raises(UserError, match="no tensor"):
        read_trunk(tmp_path, our_config(tmp_path, layers=3))
