"""A pretrained model for another tokenizer, or for longer texts than it was trained on."""

import copy

import torch
from torch import Tensor

from mmscale.data.tokenizer import Tokenizer
from mmscale.model.modeling_mmscale import MMScaleModel


def change_vocabulary(
    model: MMScaleModel, old: Tokenizer, new: Tokenizer, context_length: int | None = None
) -> MMScaleModel:
    """The model with the rows of another tokenizer's pieces, and positions for texts of `context_length` tokens.

    A piece that both tokenizers know keeps its rows, in the token table and in the vocabulary head; another piece
    starts as the mean of the rows of the old pieces that spell it. New positions, between the old ones and the CLS
    token's row, which stays the last one, start as the last old position. The model that is given stays as it is.

    Args:
        context_length: caption tokens, start and end marks included; the model's own when None.

    Raises:
        ValueError: `context_length` is shorter than the model's.
    """
    config = copy.deepcopy(model.config)
    own_length = config.text_config.context_length
    context_length = context_length or own_length
    if context_length < own_length:
        raise ValueError(f"model.text.context_length: {context_length} is shorter than the pretrained {own_length}")
    config.vocab_size, config.text_config.context_length = new.vocab_size, context_length
    config.pad_token_id, config.bos_token_id, config.eos_token_id = new.pad_id, new.start_id, new.end_id
    tensors = model.state_dict()
    mixture = piece_mixture(old, new)
    for name in ("text.tokens.weight", "decoder.head.weight"):
        if name in tensors:
            tensors[name] = _mixed(tensors[name], mixture)
    tensors["text.positions"] = _lengthened(tensors["text.positions"], context_length)
    changed = MMScaleModel(config).to(device=model.device, dtype=model.dtype)
    changed.load_state_dict(tensors)
    return changed.train(model.training)


def piece_mixture(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """For each piece of `new`, the pieces of `old` whose mean it starts as: itself where `old` has it."""
    known = {piece: number for number, piece in enumerate(old.pieces())}
    marks = {new.pad_id: old.pad_id, new.start_id: old.start_id, new.end_id: old.end_id}
    return [
        [marks[number]] if number in marks else [known[piece]] if piece in known else old.spell(piece)
        for number, piece in enumerate(new.pieces())
    ]


def _mixed(table: Tensor, mixture: list[list[int]]) -> Tensor:
    return torch.stack([table[rows].mean(0) for rows in mixture])


def _lengthened(positions: Tensor, context_length: int) -> Tensor:
    """[old length + 1, width] to [context_length + 1, width]; the last row is that of CLS."""
    rows, cls_row = positions[:-1], positions[-1:]
    return torch.cat([rows, rows[-1:].expand(context_length - len(rows), -1), cls_row])
