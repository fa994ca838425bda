"""Writing captions: the cache, beams and prompts change how the work is done, never what comes out."""

import pytest
import torch

from mmscale.model import MMScaleConfig, MMScaleModel

VOCABULARY, CONTEXT = 40, 12


@pytest.fixture(scope="module")
def model() -> MMScaleModel:
    torch.manual_seed(0)
    config = MMScaleConfig(
        {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "pooler_queries": 5},
        {"context_length": CONTEXT, "width": 16, "layers": 2, "heads": 2},
        {"layers": 2, "heads": 2},
        embed_dim=16,
        vocab_size=VOCABULARY,
    )
    model = MMScaleModel(config).eval()
    with torch.no_grad():  # captions of a fresh model repeat one token, which would hide mistakes
        model.text.tokens.weight.mul_(40)
        model.text.positions.mul_(40)
    return model


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def write(model, pictures, **kwargs):
    torch.manual_seed(7)
    return model.generate(
        pixel_values=pictures,
        return_dict_in_generate=True,
        output_logits=True,
        **({"min_new_tokens": 9, "max_new_tokens": 9} | kwargs),
    )


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "top-p": {"do_sample": True, "top_p": 0.8, "temperature": 2.0},
    "prompt": {"input_ids": torch.tensor([[2, 17, 5]]), "min_new_tokens": 6, "max_new_tokens": 6},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_changes_no_logit_of_any_step(model, pictures, way):
    cached, plain = (write(model, pictures, use_cache=use_cache, **WAYS[way]) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert len(cached.logits) == (6 if way == "prompt" else 9)
    for ours, expected in zip(cached.logits, plain.logits, strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_generation_steps_give_the_logits_of_the_training_forward(model, pictures):
    """So the CLS token, which training has and generation leaves out, plays no part in captions."""
    output = write(model, pictures)
    whole = model(output.sequences, pictures, lengths=torch.full((3,), output.sequences.shape[1])).logits
    for step, logits in enumerate(output.logits):
        assert (logits - whole[:, step]).abs().max() <= 1e-5 * whole.abs().max()
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3
    assert max(len(set(row)) for row in output.sequences.tolist()) > 4


def test_a_batch_gives_what_each_picture_gives_alone(model, pictures):
    for kwargs in ({}, {"num_beams": 3}):
        together = write(model, pictures, **kwargs).sequences
        alone = [write(model, picture[None], **kwargs).sequences[0] for picture in pictures]
        assert torch.equal(together, torch.stack(alone))


def test_left_padded_prompts_give_what_each_gives_alone(model, pictures):
    prompts = [[2, 9, 30, 4], [2, 7], [2, 11, 12]]
    padded = torch.tensor([[0] * (4 - len(p)) + p for p in prompts])
    mask = (padded != 0).long()
    for use_cache in (True, False):
        kwargs = {"min_new_tokens": 6, "max_new_tokens": 6, "use_cache": use_cache}
        together = write(model, pictures, input_ids=padded, attention_mask=mask, **kwargs).sequences
        for picture, prompt, row in zip(pictures, prompts, together, strict=True):
            alone = write(model, picture[None], input_ids=torch.tensor([prompt]), **kwargs).sequences[0]
            assert row[4 - len(prompt) :].tolist() == alone.tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_a_rank_that_has_finished_steps_on_beside_the_others(model, pictures, padded, monkeypatch):
    prompts = torch.tensor([[0, 2, 17], [2, 9, 5], [2, 8, 4]])
    prompt = {"input_ids": prompts, "attention_mask": (prompts != 0).long()} if padded else {}
    alone = write(model, pictures, **prompt, min_new_tokens=4, max_new_tokens=4).sequences
    steps = iter(range(4 + 3))  # in place of what the ranks tell each other
    monkeypatch.setattr(model, "_has_unfinished_sequences", lambda *args, **kwargs: next(steps, None) is not None)
    beside = write(model, pictures, **prompt, min_new_tokens=4, max_new_tokens=4, synced_gpus=True).sequences
    assert torch.equal(beside, alone) and next(steps, None) is None


def test_pictures_are_encoded_once_and_shared_by_their_beams(model, pictures):
    vision, projected, mixed = [], [], []
    handles = [
        model.vision.register_forward_hook(lambda *_: vision.append(1)),
        model.decoder.cross_blocks[0].attention.key_value.register_forward_hook(lambda *_: projected.append(1)),
        model.decoder.cross_blocks[0].attention.register_forward_pre_hook(lambda _, args: mixed.append(args)),
    ]
    write(model, pictures, num_beams=4)
    for handle in handles:
        handle.remove()
    assert len(vision) == len(projected) == 1
    assert len(mixed) == 9
    x, _, (key, _), *_ = mixed[0]
    assert (x.shape[0], key.shape[0]) == (12, 3)


def test_one_cache_spans_both_stacks_and_each_step_adds_one_token(model, pictures):
    cache = write(model, pictures).past_key_values
    assert len(cache.layers) == 4
    assert all(layer.keys.shape[2] == 9 for layer in cache.layers)  # the last token was never an input


def test_captions_end_at_the_end_mark_or_with_the_context(model, pictures):
    sequences = model.generate(pixel_values=pictures, do_sample=False, min_new_tokens=CONTEXT - 1)
    assert sequences.shape == (3, CONTEXT)
    end = model.config.eos_token_id
    first = int(write(model, pictures).sequences[0, 3])
    sequences = model.generate(pixel_values=pictures, do_sample=False, eos_token_id=first)
    row = sequences[0].tolist()
    assert row.index(first) <= 3 and set(row[row.index(first) + 1 :]) <= {0, end}


@pytest.mark.parametrize("way", WAYS)
def test_short_captions_without_keys_and_values_are_the_same(model, pictures, way, monkeypatch):
    made = []
    for few in (False, True):
        monkeypatch.setattr("mmscale.model.generation.few_queries", lambda *_, few=few: few)
        monkeypatch.setattr("mmscale.model.layers.few_queries", lambda *_, few=few: few)
        made.append(write(model, pictures, **WAYS[way]))
    assert torch.equal(made[0].sequences, made[1].sequences)
    for ours, expected in zip(made[1].logits, made[0].logits, strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_picture_tokens_may_be_encoded_before(model, pictures):
    with torch.no_grad():
        _, image_tokens = model.encode_image(pictures)
    kwargs = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(image_tokens=image_tokens, **kwargs), model.generate(pixel_values=pictures, **kwargs)
    )


def test_what_cannot_work_is_refused(model, pictures):
    with pytest.raises(ValueError, match="pixel_values"):
        model.generate()
    with pytest.raises(ValueError, match="leaves room for 11"):
        model.generate(pixel_values=pictures, max_new_tokens=12)
    config = MMScaleConfig(model.config.vision_config, model.config.text_config, {"layers": 0}, embed_dim=16)
    with pytest.raises(ValueError, match="no decoder"):
        MMScaleModel(config).generate(pixel_values=pictures)
