"""What a model of the Transformers library is expected to do."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, pipeline

from mmscale.config import DecoderSizes, ModelConfig, ObjectiveConfig, TextSizes, VisionSizes
from mmscale.model import MMScaleImageProcessor, MMScaleModel, MMScaleOutput, MMScaleProcessor
from mmscale.model.flops import training_flops
from mmscale.model.patch_dropout import kept_patches
from mmscale.model.presets import PRESETS, build_model, build_model_config
from mmscale.objectives.pretraining import PretrainingObjective, forward_backward

SIZES = ModelConfig(
    embed_dim=16,
    vision=VisionSizes(image_size=16, patch_size=4, width=24, layers=2, heads=2, pooler_queries=5, pooler_heads=2),
    text=TextSizes(context_length=12, width=16, layers=2, heads=2),
    decoder=DecoderSizes(layers=1, heads=2),
)


def new_model(checkpoint: str = "none", **settings) -> MMScaleModel:
    torch.manual_seed(0)
    return build_model(build_model_config(SIZES.model_copy(update=settings), 50), checkpoint)


def inputs(batch: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([12, 5, 3, 9])[:batch]
    input_ids = torch.randint(4, 50, (batch, 12), generator=generator)
    input_ids[torch.arange(12) >= lengths[:, None]] = 0
    pictures = torch.randint(0, 256, (batch, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return {"input_ids": input_ids, "pixel_values": pictures, "attention_mask": (input_ids != 0).long()}


def outputs(model: MMScaleModel, **changes) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = model.eval()(**(inputs() | changes))
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0):
    assert found.keys() == expected.keys()
    for name in expected:
        worst = (found[name].float() - expected[name].float()).abs().max()
        assert worst <= tolerance * expected[name].abs().max(), name


def test_saved_and_loaded_it_gives_the_same_outputs_with_nothing_missing(tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path)
    loaded, info = MMScaleModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_equal(outputs(loaded), outputs(model))


def test_the_saved_folder_carries_its_code_and_loads_by_the_auto_classes(tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path)
    assert {"modeling_mmscale.py", "layers.py", "generation.py"} <= {file.name for file in tmp_path.iterdir()}
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules")
    assert_equal(outputs(loaded), outputs(model))
    pictures = inputs()["pixel_values"]
    written = [each.generate(pixel_values=pictures, max_new_tokens=5, do_sample=False) for each in (loaded, model)]
    assert torch.equal(*written)


def test_a_configuration_survives_json(tmp_path):
    config = new_model(legacy_cls_mask=True).config
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert json.loads(again.to_json_string(use_diff=False)).keys() == json.loads(config.to_json_string(False)).keys()
    assert again.vision_config.width == 24 and again.text_config.context_length == 12 and again.legacy_cls_mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_loads_in_half_precision(dtype, tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path)
    half = MMScaleModel.from_pretrained(tmp_path, dtype=dtype)
    assert all(parameter.dtype == dtype for parameter in half.parameters())
    found, expected = outputs(half), outputs(model)
    assert found["image_embeds"].dtype == dtype
    assert_equal(found, expected, tolerance=0.1)
    assert half.generate(pixel_values=inputs()["pixel_values"], max_new_tokens=4).shape[0] == 4


def test_device_map_auto_places_it_whole(tmp_path):
    pytest.importorskip("accelerate")
    model = new_model()
    model.save_pretrained(tmp_path)
    assert_equal(outputs(MMScaleModel.from_pretrained(tmp_path, device_map="auto").cpu()), outputs(model), 1e-5)


def test_evaluation_is_deterministic_and_a_freshly_seeded_model_the_same():
    model = new_model()
    assert_equal(outputs(model), outputs(model))
    assert_equal(outputs(new_model()), outputs(model))


def test_how_far_a_batch_is_padded_changes_nothing():
    model = new_model()
    short = inputs()["input_ids"].clone()
    short[0, 9:] = 0
    masks = {"attention_mask": (short != 0).long()}
    wide = outputs(model, input_ids=short, **masks)
    narrow = outputs(model, input_ids=short[:, :9], attention_mask=masks["attention_mask"][:, :9])
    wide["logits"] = wide["logits"][:, :9]
    real = (short[:, :9] != 0)[..., None]
    for found in (wide, narrow):
        found["logits"] = found["logits"] * real
    assert_equal(narrow, wide, 1e-5)


def test_what_stands_in_the_padding_changes_nothing():
    model, given = new_model(), inputs()
    rubbish = given["input_ids"] + (given["attention_mask"] == 0) * 7
    found, expected = outputs(model, input_ids=rubbish), outputs(model)
    for each in (found, expected):
        each["logits"] = each["logits"] * given["attention_mask"][..., None]
    assert_equal(found, expected)


def test_a_sample_does_not_depend_on_its_batch():
    model, given = new_model().eval(), inputs()
    together = outputs(model)
    for row in range(4):
        alone = outputs(model, **{name: value[row : row + 1] for name, value in given.items()})
        for name in ("image_embeds", "text_embeds", "logits", "image_tokens"):
            assert_equal({name: alone[name][0]}, {name: together[name][row]}, 1e-5)


def test_eager_attention_gives_the_outputs_of_sdpa_and_the_weights_too():
    model = new_model()
    expected = outputs(model)
    model.set_attn_implementation("eager")
    assert_equal(outputs(model), expected, 1e-5)
    with torch.no_grad():
        found = model(**inputs(), output_hidden_states=True, output_attentions=True)
    shapes = {part: [tuple(x.shape) for x in states] for part, states in found.hidden_states.items()}
    assert shapes == {"vision": [(4, 17, 24)] * 3, "text": [(4, 13, 16)] * 3, "decoder": [(4, 12, 16)] * 3}
    assert [x.shape[1:] for x in found.attentions["decoder"]] == [(2, 12, 12), (2, 12, 4)]
    assert len(found.attentions["vision"]) == len(found.attentions["text"]) == 2
    for part in found.attentions.values():
        assert all(torch.allclose(weights.sum(-1), torch.ones(())) for weights in part)
    assert not found.attentions["text"][0].triu(1).any()  # causal


def test_attentions_of_fused_kernels_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        new_model()(**inputs(), output_attentions=True)


def test_it_returns_a_model_output_or_a_tuple():
    model = new_model().eval()
    found = model(**inputs(), labels=inputs()["input_ids"])
    assert isinstance(found, MMScaleOutput)
    values = model(**inputs(), labels=inputs()["input_ids"], return_dict=False)
    assert isinstance(values, tuple) and torch.equal(values[0], found.loss)
    labels = inputs()["input_ids"][:, 1:].masked_fill(inputs()["input_ids"][:, 1:] == 0, -100)
    assert torch.isclose(found.loss, F.cross_entropy(found.logits[:, :-1].transpose(1, 2), labels, ignore_index=-100))


@torch.no_grad()
def test_features_are_the_forwards_embeddings_of_unit_length():
    model, given = new_model().eval(), inputs()
    found = model(**given)
    assert torch.allclose(model.get_image_features(given["pixel_values"]), found.image_embeds, atol=1e-6)
    assert torch.equal(model.get_text_features(given["input_ids"], given["attention_mask"]), found.text_embeds)
    assert torch.allclose(found.image_embeds.norm(dim=1), torch.ones(4))
    logits = found.image_embeds @ found.text_embeds.T / 0.07
    assert torch.allclose(found.logits_per_image, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(**given | {"pixel_values": None}).text_embeds, found.text_embeds)
    assert model(pixel_values=given["pixel_values"]).text_embeds is None


@torch.no_grad()
def test_bytes_are_normalised_as_the_processor_does():
    model, pictures = new_model().eval(), inputs()["pixel_values"]
    processor = MMScaleImageProcessor(16, model.config.image_mean, model.config.image_std)
    floats = processor(list(pictures))["pixel_values"]
    assert torch.allclose(model.get_image_features(floats), model.get_image_features(pictures), atol=1e-5)


def gradients(model: MMScaleModel, rows: int = 4, **weights) -> dict[str, torch.Tensor]:
    objective = PretrainingObjective(model.train(), ObjectiveConfig(**weights))
    given = inputs(rows)
    given["lengths"] = given.pop("attention_mask").sum(1)
    batch = SimpleNamespace(**given, valid=torch.ones(rows, dtype=torch.bool), positions=torch.arange(rows))
    model.zero_grad()
    forward_backward(objective, [batch], lambda loss: loss.backward())
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["full", "every_2"])
def test_activation_checkpointing_recomputes_the_same_gradients(mode):
    expected = gradients(new_model())
    model, ran = new_model(mode), []
    for block in (*model.vision.blocks, *model.text.blocks):
        block.attention.register_forward_hook(lambda *_: ran.append(1))
    assert_equal(gradients(model), expected)
    assert len(ran) == {"full": 8, "every_2": 6}[mode]  # four blocks, and again those that are recomputed


def test_transformers_own_switch_for_checkpointing_works():
    expected = gradients(new_model())
    model = new_model()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.vision.blocks[0].gradient_checkpointing
    assert_equal(gradients(model), expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_an_unknown_checkpointing_mode_is_refused():
    for mode in ("some", "every_0", "every_x"):
        with pytest.raises(ValueError, match="none, full, every_N"):
            new_model(mode)


def test_compiled_blocks_give_the_same_gradients():
    images_and_texts = {"decoder": DecoderSizes(layers=0)}  # the decoder's blocks are of the same kind
    plain, model, graphs = new_model(**images_and_texts), new_model(**images_and_texts), []
    model.compile_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for rows in (4, 3, 2):  # packed texts of 29, 20 and 17 tokens
        found, expected = (gradients(each, rows, caption_weight=0.0) for each in (model, plain))
        assert_equal(found, expected, 1e-5)
    assert len(graphs) == 4  # for each number of pictures, and one for every text


def test_patch_dropout_is_a_function_of_seed_and_position():
    kept = kept_patches(torch.tensor([5, 6, 5, 2**62]), 49, 20, seed=3)
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept, kept_patches(torch.tensor([5, 6, 5, 2**62]), 49, 20, seed=4))
    assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < 49
    chosen = F.one_hot(kept_patches(torch.arange(4000), 49, 20, seed=0), 49).sum(1).float()
    together = chosen.T @ chosen / 4000
    shares, pairs = together.diagonal(), together[~torch.eye(49, dtype=torch.bool)]
    assert ((shares - 20 / 49).abs() < 0.043).all()  # every patch is kept as often, to 5.5 standard deviations,
    assert ((pairs - 20 / 49 * 19 / 48).abs() < 0.032).all()  # and every two of them together


def test_patch_dropout_leaves_patches_out_in_training_alone():
    model = new_model(patch_dropout=0.5)
    seen = []
    model.vision.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    gradients(model)
    outputs(model)
    assert seen == [9, 17]


@torch.no_grad()
def test_a_kept_patch_takes_its_position_along():
    """Attention knows no order: patches that come in another one come out in that one."""
    vision, pictures = new_model().vision.eval(), inputs()["pixel_values"]
    order = torch.randperm(16).expand(4, -1)
    shuffled = vision.trunk(pictures, keep=order)[:, 1:]  # the class token stays first
    assert torch.allclose(shuffled, vision.trunk(pictures)[:, 1:][:, order[0]], atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("length, patch_tokens", [(10, False), (32, True)])
def test_the_flop_formula_agrees_with_pytorchs_counter(preset, length, patch_tokens):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = build_model_config(ModelConfig(preset=preset, patch_tokens=patch_tokens), 1000)
    config.vision_config.layers = config.text_config.layers = config.decoder_config.layers = 2  # the rest is more of it
    size = config.vision_config.image_size
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective = PretrainingObjective(build_model(config).train(), ObjectiveConfig())
        batch = {
            "pixel_values": torch.zeros(8, 3, size, size, dtype=torch.uint8),
            "input_ids": torch.zeros(8, length, dtype=torch.int64),
            "lengths": torch.full((8,), length),
            "valid": torch.ones(8, dtype=torch.bool),
            "positions": torch.arange(8),
        }
        objective(**batch, num_valid=torch.ones(()), num_tokens=torch.ones(()))[0].backward()
    assert 8 * training_flops(config, length) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("preset, millions", [("b32", 253.6), ("l14", 638.5)], ids=["coca_ViT-B-32", "coca_ViT-L-14"])
def test_presets_have_open_clips_sizes(preset, millions):
    with torch.device("meta"):
        model = MMScaleModel(build_model_config(ModelConfig(preset=preset), 49408))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_g14_preset_is_of_the_1b_class():
    with torch.device("meta"):
        model = MMScaleModel(build_model_config(ModelConfig(preset="g14"), 32000))
    assert 1e9 < sum(p.numel() for p in model.vision.parameters()) < 1.1e9


def test_a_fresh_model_knows_nothing_yet_everywhere_alike():
    """Losses near those of guessing, and activations of a size that trains: nothing explodes or vanishes with depth."""
    torch.manual_seed(0)
    config = build_model_config(ModelConfig(preset="tiny"), 300)
    model = build_model(config).train()
    pictures = torch.randint(0, 256, (16, 3, config.vision_config.image_size, config.vision_config.image_size))
    ids = torch.randint(4, 300, (16, 12))
    found = model(ids, pictures.to(torch.uint8), labels=ids, output_hidden_states=True)
    assert found.loss.item() == pytest.approx(5.7 + 0.5, abs=0.6)  # log 300, and logits of unit variance
    for states in found.hidden_states.values():
        assert all(0.005 < x.std() < 5 for x in states)


def test_sizes_that_do_not_fit_are_refused():
    for update, message in (
        ({"vision": VisionSizes(image_size=30, patch_size=8)}, "vision.image_size by vision.patch_size"),
        ({"vision": VisionSizes(heads=5)}, "vision.width by vision.heads"),
        ({"vision": VisionSizes(pooler_queries=1)}, "pooler_queries"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model_config(ModelConfig(preset="tiny").model_copy(update=update), 50)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<s>", "</s>", "a", "photo", "of", "red", "circle"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_the_processor_survives_saving(tmp_path):
    processor = MMScaleProcessor(MMScaleImageProcessor(16), word_tokenizer())
    processor.save_pretrained(tmp_path)
    again = MMScaleProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    picture = inputs()["pixel_values"][0]
    given = {"images": [picture, picture], "text": ["a red circle", "blue"], "padding": True, "return_tensors": "pt"}
    found, expected = again(**given), processor(**given)
    assert found.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert_equal(dict(found), dict(expected))


def test_it_runs_in_the_zero_shot_pipeline():
    from PIL import Image

    model = new_model().eval()
    classify = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=word_tokenizer(),
        image_processor=MMScaleImageProcessor(16, model.config.image_mean, model.config.image_std),
    )
    picture = Image.fromarray(inputs()["pixel_values"][0].permute(1, 2, 0).numpy())
    answers = classify(picture, candidate_labels=["red circle", "blue square"], hypothesis_template="a photo of {}")
    assert {answer["label"] for answer in answers} == {"red circle", "blue square"}
    assert sum(answer["score"] for answer in answers) == pytest.approx(1.0)
