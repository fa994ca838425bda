"""Another tokenizer and a longer context for a pretrained model."""

import pytest
import torch
from checkpoints import WORDS, write_checkpoint

from mmscale.adapt.vocabulary import change_vocabulary, piece_mixture
from mmscale.data.tokenizer import SPACE, train_tokenizer
from mmscale.evaluate.encoding import pad_tokens


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """(old model, old tokenizer, changed model, new tokenizer): the new one knows all old words, and some more."""
    folder = tmp_path_factory.mktemp("vocabulary")
    model, old, _ = write_checkpoint(folder / "run")
    lines = [" ".join([*WORDS[i % 7 :: 1 + i % 5], "how many redcircles"]) for i in range(200)]
    new = train_tokenizer(lines, folder / "new.model", 340)
    return model, old, change_vocabulary(model, old, new, 40).eval(), new


def outputs(model, tokenizer, texts):
    input_ids, lengths = pad_tokens([tokenizer.encode(text, 24) for text in texts], tokenizer.pad_id, 24)
    pixel_values = torch.rand(len(texts), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids, pixel_values, lengths=lengths)


def test_words_that_both_tokenizers_know_read_and_score_as_before(changed):
    model, old, model_now, new = changed
    texts = ["two small circle", "a large red square above"]
    before, now = outputs(model, old, texts), outputs(model_now, new, texts)
    torch.testing.assert_close(now.text_embeds, before.text_embeds)
    torch.testing.assert_close(now.image_embeds, before.image_embeds)
    rows = {piece: number for number, piece in enumerate(old.pieces())}
    both = [(rows[piece], number) for number, piece in enumerate(new.pieces()) if piece in rows]
    assert len(both) > 256
    old_rows, new_rows = torch.tensor(both).T
    torch.testing.assert_close(now.logits[..., new_rows], before.logits[..., old_rows])


def test_a_new_piece_starts_as_the_mean_of_the_pieces_that_spelt_it(changed):
    model, old, model_now, new = changed
    number = new.pieces().index(f"{SPACE}redcircles")
    spelt = old.encode("redcircles", 24)[1:-1]
    assert piece_mixture(old, new)[number] == spelt and len(spelt) > 1
    for table, table_now in (
        (model.text.tokens.weight, model_now.text.tokens.weight),
        (model.decoder.head.weight, model_now.decoder.head.weight),
    ):
        torch.testing.assert_close(table_now[number], table[spelt].mean(0))


def test_a_longer_context_keeps_the_row_of_cls_last(changed):
    model, _, model_now, _ = changed
    assert model_now.config.text_config.context_length == 40 and model.config.text_config.context_length == 24
    table, longer = model.text.positions, model_now.text.positions
    assert longer.shape == (41, table.shape[1])
    assert torch.equal(longer[-1], table[-1]) and torch.equal(longer[:24], table[:24])
    assert torch.equal(longer[24:40], table[23:24].expand(16, -1))


def test_a_shorter_context_is_refused(changed):
    model, old, _, new = changed
    with pytest.raises(ValueError, match="16 is shorter than the pretrained 24"):
        change_vocabulary(model, old, new, 16)
