"""The same weights give the same outputs as open_clip's CoCa (`tests/data/make_open_clip_reference.py` made those)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmscale.config import ModelConfig
from mmscale.errors import UserError
from mmscale.export.initial import take_initial_weights
from mmscale.export.open_clip import from_open_clip, open_clip_config, read_open_clip, table, to_open_clip
from mmscale.model import MMScaleConfig, MMScaleModel

REFERENCE = Path(__file__).parent / "data" / "open_clip_coca.safetensors"
SIZES = ("narrow", "even")


def our_config(theirs: dict, **settings) -> MMScaleConfig:
    """Our configuration of a model that open_clip's JSON describes."""
    vision, text, decoder = (theirs[part] for part in ("vision_cfg", "text_cfg", "multimodal_cfg"))
    return MMScaleConfig(
        vision_config={
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["width"],
            "layers": vision["layers"],
            "heads": vision["width"] // vision.get("head_width", 64),
            "pooler_queries": vision.get("attn_pooler_queries", 256),
            "pooler_heads": vision["attn_pooler_heads"],
        },
        text_config={key: text[key] for key in ("context_length", "width", "layers", "heads")},
        decoder_config={key: decoder[key] for key in ("layers", "heads")},
        embed_dim=theirs["embed_dim"],
        vocab_size=text["vocab_size"],
        **settings,
    )


def reference(size: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """open_clip's configuration, state dict, and inputs with outputs."""
    with safe_open(REFERENCE, "pt") as file:
        config = json.loads(file.metadata()["configs"])[size]
    tensors = {name.removeprefix(f"{size}."): x for name, x in load_file(REFERENCE).items() if name.startswith(size)}
    state = {name.removeprefix("state."): x for name, x in tensors.items() if name.startswith("state.")}
    return config, state, {name: x for name, x in tensors.items() if not name.startswith("state.")}


def load(size: str, **settings) -> tuple[MMScaleModel, dict[str, torch.Tensor]]:
    theirs, state, data = reference(size)
    model = MMScaleModel(our_config(theirs, **settings)).eval()
    model.load_state_dict(from_open_clip(state, model.config))
    return model, data


def assert_close(ours: torch.Tensor, theirs: torch.Tensor):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("legacy", [False, True])
@torch.no_grad()
def test_embeddings_and_logits_equal_open_clips(size, legacy):
    model, data = load(size, legacy_cls_mask=legacy)
    output = model(data["texts"], data["pictures"])
    assert_close(output.image_embeds, data["image_features"])
    assert_close(output.text_embeds, data["text_features" if legacy else "correct_text_features"])
    real = data["texts"] != 0
    rows = data["logits"].shape[1]
    assert_close(output.logits[:, :rows][real[:, :rows]], data["logits"][real[:, :rows]])
    assert_close(model.logit_scale()[0], data["logit_scale"])


@pytest.mark.parametrize("legacy", [False, True])
@torch.no_grad()
def test_trimming_a_text_changes_nothing(legacy):
    """Also with the legacy mask, whose CLS sees the first pad: there is one as long as the context is not full."""
    model, data = load("narrow", legacy_cls_mask=legacy)
    wanted = data["text_features" if legacy else "correct_text_features"]
    for length in (3, 7, 10, 11, 12):
        rows = (data["texts"] != 0).sum(1) <= length
        assert_close(model.get_text_features(data["texts"][rows, :length]), wanted[rows])


@pytest.mark.parametrize("size", SIZES)
def test_weights_survive_the_way_to_open_clip_and_back(size):
    theirs, state, _ = reference(size)
    model = MMScaleModel(our_config(theirs))
    there = to_open_clip(model.state_dict(), model.config)
    assert {name: x.shape for name, x in there.items()} == {name: x.shape for name, x in state.items()}
    back = from_open_clip(there, model.config)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_the_table_names_every_tensor_once():
    theirs, state, _ = reference("narrow")
    model = MMScaleModel(our_config(theirs, logit_bias_init=-10.0))
    rows = list(table(model.config))
    assert sorted(name for row in rows for name in row.ours) == sorted(model.state_dict())
    assert sorted(name for row in rows for name in row.theirs) == sorted([*state, "logit_bias"])


@pytest.mark.parametrize("size", SIZES)
def test_the_written_configuration_is_open_clips(size):
    theirs, _, _ = reference(size)
    written = open_clip_config(our_config(theirs))
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        assert theirs[part].items() <= written[part].items()
    assert written["embed_dim"] == theirs["embed_dim"]


def test_a_model_that_open_clip_cannot_hold_is_refused():
    theirs, _, _ = reference("narrow")
    with pytest.raises(UserError, match="no decoder"):
        open_clip_config(our_config(theirs | {"multimodal_cfg": {"layers": 0, "heads": 4}}))
    with pytest.raises(UserError, match="embed_dim"):
        open_clip_config(our_config(theirs | {"embed_dim": 48}))


@torch.no_grad()
def test_training_checkpoints_are_read_and_positions_interpolated(tmp_path):
    theirs, state, _ = reference("narrow")
    file = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": x for name, x in state.items()}}, file)
    larger = theirs | {"vision_cfg": theirs["vision_cfg"] | {"image_size": 32}}
    model = MMScaleModel(our_config(larger))
    tensors, left_out = read_open_clip(file, model.config)
    model.load_state_dict(tensors)
    assert left_out == []
    assert torch.equal(model.vision.positions[0], state["visual.positional_embedding"][0])
    assert model.vision.positions.shape == (17, 32)


def test_another_vocabulary_keeps_its_own_tables(tmp_path):
    theirs, state, _ = reference("narrow")
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    other = our_config(theirs | {"text_cfg": theirs["text_cfg"] | {"vocab_size": 80}})
    tensors, left_out = read_open_clip(file, other)
    assert sorted(left_out) == ["decoder.head.weight", "text.tokens.weight"]
    missing = set(MMScaleModel(other).state_dict()) - set(tensors)
    assert missing == set(left_out)


def test_a_file_that_is_no_coca_is_refused_in_one_line(tmp_path):
    theirs, state, _ = reference("narrow")
    file = tmp_path / "weights.pt"
    with pytest.raises(UserError, match="no such file"):
        read_open_clip(file, our_config(theirs))
    file.write_bytes(b"not weights")
    with pytest.raises(UserError, match="not readable"):
        read_open_clip(file, our_config(theirs))
    torch.save({name: x for name, x in state.items() if "decoder" not in name}, file)
    with pytest.raises(UserError, match="has no tensor"):
        read_open_clip(file, our_config(theirs))


@pytest.mark.parametrize("size", ["coca_ViT-B-32", "coca_ViT-L-14"])
@torch.no_grad()
def test_full_sizes_equal_the_real_open_clip(size):
    """Runs where open_clip can be imported; the stored reference covers the rest."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    theirs = open_clip.create_model(size).eval()
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.04)
    model = MMScaleModel(our_config(open_clip.get_model_config(size), legacy_cls_mask=True)).eval()
    model.load_state_dict(from_open_clip(theirs.state_dict(), model.config))
    pictures, texts = torch.randn(2, 3, 224, 224), torch.randint(1, 49000, (2, 76))
    texts[0, 9:] = texts[1, 70:] = 0
    ours, expected = model(texts, pictures), theirs(pictures, texts)
    assert_close(ours.image_embeds, expected["image_features"])
    assert_close(ours.text_embeds, expected["text_features"])
    rows = expected["logits"].shape[1]
    real = (texts != 0)[:, :rows]
    assert_close(ours.logits[:, :rows][real], expected["logits"][real])


def test_a_run_starts_from_an_open_clip_file_by_name(tmp_path):
    theirs, state, _ = reference("narrow")
    torch.save(state, tmp_path / "weights.pt")
    settings = ModelConfig(init_from=f"open_clip:{tmp_path / 'weights.pt'}")
    model = MMScaleModel(our_config(theirs))
    (note,) = take_initial_weights(model, settings)
    assert "tensors of open_clip:" in note
    expected = from_open_clip(state, model.config)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match=r"`vision\.pooler\.queries`"):
        wider = theirs["vision_cfg"] | {"attn_pooler_queries": 12}
        take_initial_weights(MMScaleModel(our_config(theirs | {"vision_cfg": wider})), settings)


def test_a_run_with_patch_tokens_starts_from_weights_without_them(tmp_path):
    theirs, state, _ = reference("narrow")
    torch.save(state, tmp_path / "weights.pt")
    config = our_config(theirs)
    config.vision_config.patch_tokens = True
    model = MMScaleModel(config)
    drawn = {name: tensor.clone() for name, tensor in model.state_dict().items() if "unpooled" in name}
    (note,) = take_initial_weights(model, ModelConfig(init_from=f"open_clip:{tmp_path / 'weights.pt'}"))
    assert "vision.unpooled.places" in note and "are new (model.patch_tokens)" in note
    expected = from_open_clip(state, our_config(theirs)) | drawn
    assert drawn and all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
