"""A SentencePiece unigram model as a fast Transformers tokenizer that gives the same ids for every text.

Three things keep the two equal where a plain conversion goes wrong:

- Control and byte pieces (`</s>`, `<0x41>`) live in the fast tokenizer's trie like any word, so a caption that spells
  one would become one. Their text is cut where no ordinary piece can reach across, and their score is too low to be
  chosen.
- SentencePiece puts its space mark before every text and drops marks at its end, also where the text brings its own.
- Words are not split before the search for the best pieces, as SentencePiece does not split them either.
"""

import re
from itertools import pairwise

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto


def fast_tokenizer(tokenizer: Tokenizer, model: bytes, context_length: int) -> PreTrainedTokenizerFast:
    """The project's tokenizer as one that `AutoTokenizer` loads.

    Args:
        model: the content of its SentencePiece file.
        context_length: longest caption in tokens, marks included; texts are cut there, keeping the end mark.

    Raises:
        UserError: a kind of SentencePiece model that has no equal among fast tokenizers.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    start, end = proto.pieces[tokenizer.start_id].piece, proto.pieces[tokenizer.end_id].piece
    fast = _convert(proto, tokenizer.path)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} {start} $B {end}",
        special_tokens=[(start, tokenizer.start_id), (end, tokenizer.end_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=start,
        eos_token=end,
        pad_token=proto.pieces[tokenizer.pad_id].piece,
        unk_token=next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
        model_max_length=context_length,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,  # `</s>` in a caption is text, not the end of it
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _convert(proto, where: str) -> FastTokenizer:
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.UNIGRAM:
        raise UserError(f"{where}: only SentencePiece models of type `unigram` can be exported")
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise UserError(f"{where}: a SentencePiece model with spaces after words, or unmarked, cannot be exported")
    if any(piece.type == USER_DEFINED for piece in proto.pieces):
        raise UserError(f"{where}: a SentencePiece model with user-defined symbols cannot be exported")

    special = [piece.piece for piece in proto.pieces if piece.type != NORMAL]
    scores = [piece.score for piece in proto.pieces if piece.type == NORMAL]
    never = 100 * (min(scores) - 10)  # worse than the longest special piece spelled in unknown characters
    vocabulary = [(piece.piece, piece.score if piece.type == NORMAL else never) for piece in proto.pieces]
    fast = FastTokenizer(Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))

    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    fast.normalizer = normalizers.Sequence(steps)

    cuts = _cuts(special, {pair for piece in proto.pieces if piece.type == NORMAL for pair in pairwise(piece.piece)})
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(cuts)), behavior="isolated")
    stripped = 2**16 if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix)
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", stripped, 0),
        ]
    )
    fast.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in proto.pieces
            if piece.type in (UNKNOWN, CONTROL)
        ]
    )
    fast.encode_special_tokens = True
    return fast


def _cuts(special: list[str], inside: set[tuple[str, str]]) -> list[str]:
    """One pattern for each special piece: the empty place in its text where no ordinary piece has both neighbours.

    A piece without such a place is spelled in characters the vocabulary knows, so its score alone keeps it out.
    """
    cuts = []
    for piece in special:
        for place, neighbours in enumerate(pairwise(piece), start=1):
            if neighbours not in inside:
                cuts.append(f"(?<={re.escape(piece[:place])})(?={re.escape(piece[place:])})")
                break
    return cuts
