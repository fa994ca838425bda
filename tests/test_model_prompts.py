"""Parts that a tuned model may have, prompts and patch tokens: off they are not there, on they change what they should.

They work wherever the model does.
"""

import pytest
import torch

from mmscale.errors import UserError
from mmscale.export.clip_vision import clip_vision_config
from mmscale.export.open_clip import open_clip_config
from mmscale.model import MMScaleConfig, MMScaleModel

VOCABULARY, CONTEXT = 40, 12
NAMES = {"names": ["red", "light blue", "green"], "token_ids": [[9], [11, 12], [7]], "context_tokens": 2}


def build(vision=None, decoder=None, **whole) -> MMScaleModel:
    torch.manual_seed(0)
    config = MMScaleConfig(
        {"image_size": 16, "patch_size": 8, "width": 16, "layers": 3, "heads": 2, "pooler_queries": 5} | (vision or {}),
        {"context_length": CONTEXT, "width": 16, "layers": 2, "heads": 2},
        {"layers": 2, "heads": 2, **(decoder or {})},
        embed_dim=16,
        vocab_size=VOCABULARY,
        **whole,
    )
    model = MMScaleModel(config).eval()
    with torch.no_grad():
        model.text.tokens.weight.mul_(40)
        model.text.positions.mul_(40)
        for name, parameter in model.named_parameters():
            if "prompt" in name or "prefix" in name or "guide" in name:
                parameter.normal_()
    return model


ALL = {
    "vision": {"prompt_tokens": 2, "prompt_depth": "deep", "guided_pooling": True, "patch_tokens": True},
    "decoder": {"prefix_tokens": 3},
    "class_prompts": NAMES | {"kind": "image"},
}


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_prompted_model_is_saved_and_loaded_with_its_prompts(tmp_path, pictures):
    model = build(**ALL)
    model.save_pretrained(tmp_path)
    again = MMScaleModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[2, 9, 30, 3]]).expand(3, -1)
    for name, found in again(ids, pictures).items():
        if isinstance(found, torch.Tensor):
            assert torch.allclose(found, model(ids, pictures)[name], atol=1e-6), name
    embeds = model.get_image_features(pictures)
    assert torch.allclose(again.class_logits(embeds), model.class_logits(embeds), atol=1e-5)
    assert len(model.state_dict()) > len(build().state_dict())


@torch.no_grad()
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"input_ids": "left-padded"}])
def test_a_prefix_gives_the_same_captions_with_and_without_the_cache(pictures, way):
    model = build(decoder={"prefix_tokens": 3})
    if way.get("input_ids"):
        ids = torch.tensor([[0, 0, 2, 7], [2, 9, 30, 4], [0, 2, 11, 12]])
        way = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    found = [
        model.generate(
            pixel_values=pictures,
            do_sample=False,
            min_new_tokens=6,
            max_new_tokens=6,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
            **way,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for cached, plain in zip(found[0].logits, found[1].logits, strict=True):
        assert (cached - plain).abs().max() <= 1e-5 * plain.abs().max()
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.attention.prefix.value[:, :8] += 3
    sequences = model.generate(pixel_values=pictures, do_sample=False, min_new_tokens=6, max_new_tokens=6, **way)
    assert not torch.equal(sequences, found[0].sequences)


@torch.no_grad()
@pytest.mark.parametrize("parts", [{"decoder": {"prefix_tokens": 3}}, {"vision": {"patch_tokens": True}}])
def test_generation_follows_the_training_forward(pictures, parts):
    model = build(**parts)
    output = model.generate(
        pixel_values=pictures, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
    )
    whole = model(output.sequences, pictures, lengths=torch.full((3,), output.sequences.shape[1])).logits
    for step, logits in enumerate(output.logits):
        assert (logits - whole[:, step]).abs().max() <= 1e-5 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("depth, layers_changed", [("shallow", 1), ("deep", 3)])
def test_image_prompts_stand_beside_the_patches_of_their_blocks(pictures, depth, layers_changed, implementation):
    model = build(vision={"prompt_tokens": 2, "prompt_depth": depth})
    model.set_attn_implementation(implementation)
    plain = model.vision.trunk(pictures)
    assert plain.shape[1] == 1 + 4
    assert len(model.vision.prompts.vectors) == layers_changed
    for layer in range(layers_changed):
        model.vision.prompts.vectors[layer, :, 0] += 3
        changed = model.vision.trunk(pictures)
        model.vision.prompts.vectors[layer, :, 0] -= 3
        assert (changed - plain).abs().max() > 1e-3
    hidden = model(pixel_values=pictures, output_hidden_states=True).hidden_states["vision"]
    assert [state.shape[1] for state in hidden[1:]] == [1 + 4 + 2] * 3


@torch.no_grad()
def test_class_prompts_replace_the_placeholders_and_nothing_else():
    """With the embeddings of words as context they give the embedding of the sentence."""
    model = build(class_prompts=NAMES | {"kind": "unified"})
    model.class_prompts.context[0] = model.text.tokens.weight[[21, 22]]
    sentences = torch.tensor([[2, 21, 22, 9, 3, 0], [2, 21, 22, 11, 12, 3], [2, 21, 22, 7, 3, 0]])
    expected = model.get_text_features(sentences)
    assert torch.allclose(model.class_prompts(model.text), expected, atol=1e-5)
    one_each = build(class_prompts=NAMES | {"kind": "class"})
    one_each.class_prompts.context[:] = model.class_prompts.context
    assert torch.allclose(one_each.class_prompts(one_each.text), expected, atol=1e-5)
    one_each.class_prompts.context[1, :, 0] += 30
    changed = (one_each.class_prompts(one_each.text) - expected).abs().amax(1) > 1e-3
    assert changed.tolist() == [False, True, False]


@torch.no_grad()
def test_an_image_conditioned_prompt_reads_each_picture_alone(pictures):
    model = build(class_prompts=NAMES | {"kind": "image"})
    model.class_prompts.condition_in.bias.fill_(3.0)  # its one unit is alive
    embeds = model.get_image_features(pictures)
    together = model.class_logits(embeds)
    assert torch.allclose(together, torch.cat([model.class_logits(row[None]) for row in embeds]), atol=1e-4)
    classes = model.class_prompts(model.text, embeds)
    assert classes.shape == (3, 3, 16) and (classes[0] - classes[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_guide_turns_the_image_embedding_and_leaves_the_rest(pictures):
    model = build(vision={"guided_pooling": True})
    guides = model.get_text_features(torch.tensor([[2, 9, 3], [2, 7, 3]]))
    plain, colour, shape = (model.get_image_features(pictures, guide) for guide in (None, guides[:1], guides[1:]))
    assert (colour - shape).abs().max() > 1e-2 and (colour - plain).abs().max() > 1e-2
    each = model.get_image_features(pictures, guides[[0, 1, 0]])
    assert torch.allclose(each, torch.stack([colour[0], shape[1], colour[2]]), atol=1e-6)
    both = model.get_image_features(pictures, guides[None])
    assert torch.allclose(both, torch.stack([colour, shape], dim=1), atol=1e-6)
    tokens = [model.vision(pictures, guide=guide)[1] for guide in (None, guides[:1])]
    assert torch.allclose(*tokens, atol=1e-6)
    model.vision.guide.reset_parameters()
    assert torch.allclose(model.get_image_features(pictures, guides[:1]), plain, atol=1e-6)
    for part in model.vision.guide.weight.chunk(3):  # where to look, gain, offset
        part.normal_()
        assert (model.get_image_features(pictures, guides[:1]) - plain).abs().max() > 1e-2
        part.zero_()
    with pytest.raises(ValueError, match="not tuned to be guided"):
        build().get_image_features(pictures, guides[:1])


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_patch_tokens_follow_what_is_pooled_and_the_decoder_reads_them(pictures, guided):
    model = build(vision={"patch_tokens": True, "guided_pooling": guided})
    plain = build(vision={"guided_pooling": guided})
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "unpooled" not in name})
    guide = model.get_text_features(torch.tensor([[2, 9, 3]])) if guided else None
    (embeds, tokens), (expected, pooled) = (each.vision(pictures, guide=guide) for each in (model, plain))
    assert torch.equal(embeds, expected) and torch.equal(tokens[:, :4], pooled)
    trunk = model.vision.trunk(pictures)
    unpooled = model.vision.unpooled
    rest = unpooled.projection(torch.nn.functional.layer_norm(trunk[:, 1:], trunk.shape[-1:])) + unpooled.places
    assert tokens.shape[1] == 4 + 4 and torch.allclose(tokens[:, 4:], rest, atol=1e-5)
    keep = torch.tensor([[0, 3]]).expand(3, -1)
    (_, some), trunk = model.vision(pictures, keep, guide=guide), model.vision.trunk(pictures, keep)
    rest = unpooled.projection(torch.nn.functional.layer_norm(trunk[:, 1:], trunk.shape[-1:])) + unpooled.places[[0, 3]]
    assert torch.allclose(some[:, 4:], rest, atol=1e-5)
    states = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(2))
    shuffled = torch.cat([tokens[:, :4], tokens[[1, 2, 0], 4:]], dim=1)
    assert (model.decode(states, tokens) - model.decode(states, shuffled)).abs().max() > 1e-3


def test_formats_without_a_place_for_prompts_refuse_them():
    prompted = build(vision={"prompt_tokens": 2}).config
    with pytest.raises(UserError, match="learned prompt tokens"):
        clip_vision_config(prompted)
    for config in (prompted, build(decoder={"prefix_tokens": 2}).config):
        with pytest.raises(UserError, match="it has learned prompts"):
            open_clip_config(config)
    with pytest.raises(UserError, match="its decoder sees the patches"):
        open_clip_config(build(vision={"patch_tokens": True}).config)
    open_clip_config(build().config)
