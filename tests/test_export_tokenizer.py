"""The exported tokenizer gives SentencePiece's ids, and its texts back, for whatever people and machines write."""

import random
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from mmscale.data.tokenizer import Tokenizer, train_tokenizer
from mmscale.errors import UserError
from mmscale.export.tokenizer import _cuts, fast_tokenizer

SENTENCES = [
    "a small red circle above two large blue squares, photographed at night.",
    "Der schnelle braune Fuchs springt über den faulen Hund neben der alten Brücke.",
    "Une forêt où l'été s'achève, près du vieux pont de pierre.",
    "El rápido zorro marrón salta sobre el perro perezoso, ¿verdad?",
    "Быстрая коричневая лиса прыгает через ленивую собаку возле старого моста.",
    "敏捷的棕色狐狸跳过了懒狗,在古老的石桥旁边。",
    "素早い茶色の狐がのろまな犬を飛び越える。古い石橋のそばで。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다. 오래된 돌다리 근처에서.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول بجانب الجسر الحجري القديم.",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है, पुराने पत्थर के पुल के पास।",
]
MARKS = ["<s>", "</s>", "<pad>", "<unk>", "<0x41>", "<0xE2>", "<0x0A>", "<<s>>", "<s", "0x41>", "▁", "▁a", "▁▁"]
UNSEEN = list("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u202e\u2028\u00a0\u3000\x00\x1b\x7f\ufffd\uffff\ud7ff\t\n\r")
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🇩🇪", "🏳️‍🌈", "👍🏽", "✨", "☃︎", "e\u0301", "Z͑ͫ̓a̸l"]
SPACES = ["", " ", " ", "  ", "   "]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    shuffle = random.Random(0)
    captions = []
    for _ in range(4000):
        words = shuffle.choice(SENTENCES).split()
        shuffle.shuffle(words)
        captions.append(" ".join(words))
    captions += ["a page with <s and <0 and 0x41 and s> and d> in its <pa and ad of text"] * 50
    own = train_tokenizer(captions, folder / "tokenizer.model", 560)
    fast_tokenizer(own, Path(own.path).read_bytes(), 64).save_pretrained(folder / "export")
    return own, AutoTokenizer.from_pretrained(folder / "export")


def strings(count):
    """Texts of many kinds: languages and their mixtures, marks spelled out, emoji, unseen and unassigned characters."""
    draw = random.Random(1)
    for _ in range(count):
        words = draw.choice(SENTENCES).split() + draw.choice(SENTENCES).split()
        parts = draw.sample(words, draw.randint(0, len(words)))
        kind = draw.random()
        if kind > 0.3:
            parts += draw.choices(MARKS + UNSEEN + EMOJI + list("abc<>/|_#0x1s"), k=draw.randint(0, 8))
            draw.shuffle(parts)
        if kind > 0.8:
            broken = bytes(draw.randrange(256) for _ in range(draw.randint(1, 16)))
            points = [draw.randrange(0x110000) for _ in range(draw.randint(1, 8))]
            parts.append(broken.decode("utf-8", errors="replace"))
            parts += [chr(point) for point in points if not 0xD800 <= point < 0xE000]
        yield draw.choice(SPACES).join(parts) if kind < 0.9 else "".join(p + draw.choice(SPACES) for p in parts)


def test_ids_and_decoded_texts_equal_sentencepiece_on_20000_strings(tokenizers):
    own, exported = tokenizers
    texts = [*strings(20_000), "", " ", "\n", "▁", "▁▁ ▁", *MARKS, *UNSEEN]
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        for text, ids in zip(batch, exported(batch)["input_ids"], strict=True):
            right = own.encode(text, 1 << 20)
            assert ids == right, repr(text)
            assert exported.decode(ids, skip_special_tokens=True) == own.decode(right), repr(text)


@pytest.mark.parametrize(
    "text", ["a" * 20_000, "the fox " * 3_000, "é" * 5_000, "犬" * 5_000, "<s>" * 3_000, " " * 9_000]
)
def test_very_long_texts_are_equal_and_cut_alike(tokenizers, text):
    own, exported = tokenizers
    assert exported(text)["input_ids"] == own.encode(text, 1 << 20)
    cut = exported(text, truncation=True)["input_ids"]
    assert cut == own.encode(text, 64)
    assert cut[-1] == own.end_id


def test_a_batch_is_padded_on_the_right_with_the_models_pad(tokenizers):
    own, exported = tokenizers
    batch = exported(["a small red circle", "a"], padding=True)
    assert batch["input_ids"][1][-1] == own.pad_id == exported.pad_token_id
    assert sum(batch["attention_mask"][1]) == len(own.encode("a", 64))


def test_a_mark_is_cut_where_no_piece_reaches_across():
    assert _cuts(["<s>"], set()) == ["(?<=<)(?=s>)"]
    assert _cuts(["<s>"], {("<", "s")}) == ["(?<=<s)(?=>)"]
    assert _cuts(["<s>"], {("<", "s"), ("s", ">")}) == []


def test_a_mark_whose_every_place_is_inside_some_piece_is_kept_out_by_its_score(tokenizers, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(tokenizers[0].path).read_bytes())
    known = {piece.piece for piece in proto.pieces}
    longest = sorted((piece for piece in proto.pieces if piece.type == 1), key=lambda piece: -len(piece.piece))
    for piece, text in zip(longest, {"<", "s", ">", "<s", "s>"} - known, strict=False):
        piece.piece = text
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    own = Tokenizer.load(tmp_path / "tokenizer.model")
    exported = fast_tokenizer(own, proto.SerializeToString(), 64)
    assert _cuts(["<s>"], {("<", "s"), ("s", ">")}) == []
    for text in ("<s>", "a <s> b", "<<s>>", "x<s>y</s>", "<s", "s>"):
        assert exported(text)["input_ids"] == own.encode(text, 64), text


def test_a_model_of_another_kind_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES[:3] * 20),
        model_prefix=str(tmp_path / "bpe"),
        vocab_size=120,
        model_type="bpe",
        pad_id=3,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="only SentencePiece models of type `unigram`"):
        fast_tokenizer(Tokenizer.load(tmp_path / "bpe.model"), (tmp_path / "bpe.model").read_bytes(), 64)
