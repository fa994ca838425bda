"""BLEU, ROUGE-L and CIDEr of captions, with the figures of the COCO caption evaluation on the same tokens.

Tokens are the words of the lower-cased text: runs of letters, digits and marks, apostrophes inside a word kept, all
other punctuation dropped. (The COCO server cuts words with Stanford's PTB tokenizer instead, a Java program; on plain
English captions the two seldom differ, but published scores should say which one was used.)
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

MAX_N = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
_WORD = re.compile(r"\w+(?:['’]\w+)*")

Tokens = Sequence[str]


def tokenize(text: str) -> list[str]:
    """The words that the scores are computed on."""
    return _WORD.findall(text.lower())


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu_1` ... `bleu_4`, `rouge_l` and `cider` of a corpus.

    Args:
        captions: one for each picture.
        references: at least one for each picture.
    """
    words = [tokenize(caption) for caption in captions]
    truths = [[tokenize(reference) for reference in own] for own in references]
    scores = {f"bleu_{n}": value for n, value in enumerate(corpus_bleu(words, truths), start=1)}
    return scores | {"rouge_l": corpus_rouge_l(words, truths), "cider": corpus_cider(words, truths)}


def corpus_bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002), with the nearest reference length, the shorter one of two.

    The tiny terms that keep COCO's implementation from dividing by zero are kept, because they show where a corpus has
    no n-gram in common with its references.
    """
    matches, guesses = [0] * MAX_N, [0] * MAX_N
    caption_length = reference_length = 0
    for caption, own in zip(captions, references, strict=True):
        caption_length += len(caption)
        reference_length += min((abs(len(truth) - len(caption)), len(truth)) for truth in own)[1]
        for n in range(1, MAX_N + 1):
            counts = _ngrams(caption, n)
            most: Counter = Counter()
            for truth in own:
                most |= _ngrams(truth, n)
            matches[n - 1] += (counts & most).total()
            guesses[n - 1] += max(0, len(caption) - n + 1)
    ratio = (caption_length + 1e-15) / (reference_length + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(1, MAX_N + 1):
        product *= (matches[n - 1] + 1e-15) / (guesses[n - 1] + 1e-9)
        scores.append(product ** (1 / n) * brevity)
    return scores


def corpus_rouge_l(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """The mean F-measure of the longest common subsequence (Lin 2004); recall weighs 1.2 times as much as precision.

    Of several references the best precision and the best recall count.
    """
    total = 0.0
    for caption, own in zip(captions, references, strict=True):
        common = [_common_subsequence(caption, truth) for truth in own]
        precision = max(length / max(1, len(caption)) for length in common)
        recall = max(length / max(1, len(truth)) for length, truth in zip(common, own, strict=True))
        if precision and recall:
            total += (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return total / len(captions)


def corpus_cider(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr (Vedantam et al. 2015) as COCO computes it: clipped counts, a penalty on length, times 10.

    An n-gram weighs the more, the fewer pictures of this very corpus have it in a reference.
    """
    documents: Counter = Counter()
    for own in references:
        documents.update({ngram for truth in own for n in range(1, MAX_N + 1) for ngram in _ngrams(truth, n)})
    log_count = math.log(len(references))

    def vectors(tokens: Tokens) -> list[dict[tuple, float]]:
        return [
            {ngram: count * (log_count - math.log(max(1, documents[ngram]))) for ngram, count in grams.items()}
            for grams in (_ngrams(tokens, n) for n in range(1, MAX_N + 1))
        ]

    total = 0.0
    for caption, own in zip(captions, references, strict=True):
        of_caption = vectors(caption)
        for truth in own:
            # Lengths in bigrams, as the original counts them.
            gap = max(0, len(caption) - 1) - max(0, len(truth) - 1)
            penalty = math.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
            total += penalty * sum(map(_clipped_cosine, of_caption, vectors(truth))) / MAX_N / len(own)
    return 10 * total / len(captions)


def _ngrams(tokens: Tokens, n: int) -> Counter:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _clipped_cosine(caption: dict[tuple, float], truth: dict[tuple, float]) -> float:
    norm = math.sqrt(sum(value**2 for value in caption.values())) * math.sqrt(sum(v**2 for v in truth.values()))
    dot = sum(min(value, truth[ngram]) * truth[ngram] for ngram, value in caption.items() if ngram in truth)
    return dot / norm if norm else 0.0


def _common_subsequence(a: Tokens, b: Tokens) -> int:
    """The length of the longest common subsequence, by dynamic programming over one row."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for column, other in enumerate(b, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
