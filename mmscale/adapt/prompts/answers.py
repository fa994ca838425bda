"""Label words: which word stands for a class, chosen among candidates on the dev split."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmscale.adapt.prompts.metrics import merit
from mmscale.data.tokenizer import Tokenizer

WORD_MARK = "▁"
SWEEPS = 5  # over all classes; the search ends sooner when a sweep changes nothing


def vocabulary_words(tokenizer: Tokenizer) -> list[str]:
    """The tokenizer's pieces that are words or beginnings of words."""
    pieces = (tokenizer.piece(number) for number in range(tokenizer.vocab_size))
    return [piece[1:] for piece in pieces if piece.startswith(WORD_MARK) and piece[1:].isalpha()]


def search_answers(scores: Sequence[Tensor], targets: Tensor) -> list[int]:
    """For each class, which of its candidates to take: one class after the other, the others held.

    Args:
        scores: for each class, log scores [samples, candidates of the class]; the search starts from the first.
        targets: [samples].
    """
    chosen = [0] * len(scores)
    current = torch.stack([own[:, 0] for own in scores], dim=1)
    best = merit(current, targets)
    for _ in range(SWEEPS):
        before = list(chosen)
        for number, own in enumerate(scores):
            for candidate in range(own.shape[1]):
                trial = current.clone()
                trial[:, number] = own[:, candidate]
                if (found := merit(trial, targets)) > best:
                    best, current, chosen[number] = found, trial, candidate
        if chosen == before:
            break
    return chosen
