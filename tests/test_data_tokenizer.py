import pytest
from shard_files import caption, tokenizer, write_shards

from mmscale.config import DataConfig
from mmscale.data.samples import iter_captions
from mmscale.data.tokenizer import Tokenizer, train_tokenizer
from mmscale.errors import UserError


@pytest.mark.parametrize("text", ["a red cat", "<s> marks </s>", "漢字 and ümläuts", "two  spaces", "emoji 🦊", "½ ﬁ"])
def test_any_text_comes_back_unchanged(text):
    ids = tokenizer().encode(text, 200)
    assert ids[0] == tokenizer().start_id and ids[-1] == tokenizer().end_id
    assert tokenizer().start_id not in ids[1:] and tokenizer().end_id not in ids[:-1]
    assert tokenizer().decode(ids) == " ".join(text.split())


def test_a_long_caption_is_cut_and_keeps_its_end_mark():
    ids = tokenizer().encode("red green blue " * 50, 16)
    assert len(ids) == 16 and ids[-1] == tokenizer().end_id


def test_a_tokenizer_is_trained_on_shards_and_always_the_same(tmp_path):
    paths = write_shards(tmp_path, [30, 30])
    made = [train_tokenizer(iter_captions(paths, DataConfig()), tmp_path / f"{n}.model", 300) for n in range(2)]
    assert made[0].fingerprint == made[1].fingerprint
    assert made[0].vocab_size <= 300
    assert (made[0].pad_id, made[0].start_id, made[0].end_id) == (0, 2, 3)
    assert list(iter_captions(paths, DataConfig()))[:2] == [caption(0), caption(1)]


def test_bad_files_and_sizes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.model cannot be read"):
        Tokenizer.load(tmp_path / "nowhere.model")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "text")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "empty")
    with pytest.raises(UserError, match="no tokenizer of 20 pieces"):
        train_tokenizer(["a cat"] * 10, tmp_path / "x.model", 20)
    with pytest.raises(UserError, match="no captions"):
        train_tokenizer([], tmp_path / "x.model", 300)
    assert not (tmp_path / "x.model").exists()


def test_a_small_vocabulary_gets_whole_words(tmp_path):
    words = "small large red blue green circle square above below two three".split()  # noqa: SIM905
    captions = [f"{a} {b} {c}" for a in words for b in words for c in words]
    tokenizer = train_tokenizer(captions, tmp_path / "words.model", 320)
    for word in words:
        assert len(tokenizer.encode(word, 32)) == 3, word  # start, the word, end
