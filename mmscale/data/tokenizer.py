"""Captions as token ids: a SentencePiece unigram model with byte fallback, so that no text is unknown."""

import hashlib
import io
import itertools
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mmscale.errors import UserError

PAD_ID, UNK_ID, START_ID, END_ID = range(4)
TRAINING_THREADS = 16  # the model depends on their number: the same everywhere gives the same file everywhere
SMALL_CORPUS = 100_000  # captions, below which candidates for pieces are counted here
SMALL_VOCABULARY = 200_000  # characters in all different words together
SPACE = "\u2581"  # a space, in pieces
LONGEST_PIECE = 16  # characters, as SentencePiece's own limit


class Tokenizer:
    """A loaded SentencePiece model. `fingerprint` is the SHA-256 of its file."""

    def __init__(self, path: str | Path, data: bytes):
        self.path = str(path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.vocab_size = self._processor.vocab_size()
        self.pad_id = self._processor.pad_id()
        self.start_id = self._processor.bos_id()
        self.end_id = self._processor.eos_id()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a model file. Raises UserError when it is missing, no SentencePiece model, or without marks."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer.path: {path} cannot be read ({error.strerror}); `mmscale tokenizer` makes one"
            ) from None
        try:
            tokenizer = cls(path, data)
        except RuntimeError:
            tokenizer = None
        if tokenizer is None or tokenizer.vocab_size == 0:
            raise UserError(f"tokenizer.path: {path} is not a SentencePiece model")
        if min(tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) < 0:
            raise UserError(
                f"tokenizer.path: {path} lacks a padding, start or end piece; train one with `mmscale tokenizer`"
            )
        return tokenizer

    def encode(self, text: str, max_length: int) -> list[int]:
        """start + pieces + end, at most `max_length` ids; a longer caption is cut and keeps its end mark."""
        return [self.start_id, *self._processor.encode(text)[: max_length - 2], self.end_id]

    def piece(self, token_id: int) -> str:
        """A piece as the model file spells it, with `▁` where a word begins."""
        return self._processor.id_to_piece(token_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; padding, start and end marks are left out."""
        marks = {self.pad_id, self.start_id, self.end_id}
        return self._processor.decode([int(i) for i in ids if int(i) not in marks])

    def pieces(self) -> list[str]:
        """Every piece, by its id; a space in front is written as SentencePiece does, as U+2581."""
        return [self._processor.id_to_piece(number) for number in range(self.vocab_size)]

    def spell(self, piece: str) -> list[int]:
        """The ids, at least one and no marks, that spell a piece of another tokenizer."""
        ids = self._processor.encode(piece.removeprefix(SPACE).replace(SPACE, " "))
        if not piece.startswith(SPACE) and len(ids) > 1 and self._processor.id_to_piece(ids[0]) == SPACE:
            ids = ids[1:]  # SentencePiece puts a space before every text
        return ids or [self._processor.unk_id()]


def train_tokenizer(captions: Iterable[str], out: str | Path, vocab_size: int, *, log: bool = False) -> Tokenizer:
    """Trains a model on captions and writes it to `out`, whole or not at all.

    Unigram with byte fallback; text is not normalised beyond white space. Ids: padding 0, unknown 1, start 2, end 3.
    Raises UserError when the captions are too few for the vocabulary.
    """
    model = io.BytesIO()
    captions = iter(captions)
    first = list(itertools.islice(captions, SMALL_CORPUS))
    if not first:
        raise UserError("there are no captions to train a tokenizer on")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    seeds = _seed_pieces(first) if len(first) < SMALL_CORPUS else {}
    try:
        temporary.write_text("".join(f"{piece}\t{count}\n" for piece, count in seeds.items()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(first, captions),
            seed_sentencepieces_file=str(temporary) if seeds else "",
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            character_coverage=0.9995,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=START_ID,
            eos_id=END_ID,
            pad_piece="<pad>",
            hard_vocab_limit=False,
            num_threads=TRAINING_THREADS,
            minloglevel=0 if log else 2,
        )
    except RuntimeError as error:
        temporary.unlink()
        reason = " ".join(str(error).split())
        raise UserError(f"no tokenizer of {vocab_size} pieces can be trained on these captions: {reason}") from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.trainer_spec.ClearField("seed_sentencepieces_file")  # a path of this machine
    temporary.write_bytes(proto.SerializeToString(deterministic=True))
    temporary.replace(out)
    return Tokenizer.load(out)


def _seed_pieces(captions: list[str]) -> dict[str, int]:
    """Candidates for pieces, with how often each occurs: every part of every word.

    SentencePiece finds its own candidates among parts that *different* words share. Where there are few words, that
    leaves out most whole words, and `small` becomes four pieces. Nothing when there are too many words to matter.
    """
    words = Counter(f"{SPACE}{word}" for caption in captions for word in caption.split())
    if sum(map(len, words)) > SMALL_VOCABULARY:
        return {}
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for stop in range(start + 1, min(start + LONGEST_PIECE, len(word)) + 1):
                pieces[word[start:stop]] += count
    return dict(pieces)
