"""Image-text retrieval: for every picture the rank of its best caption, for every caption the rank of its picture.

The similarity matrix is never whole in memory: it is made block by block, and each block is reduced at once to two
counts for every query, the candidates that score above the right answer and those that tie with it. A tie is settled as
a fair draw would on average, so that a collapsed model, for which everything is alike, scores chance and not 100%.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmscale.config import EvalConfig
from mmscale.data.loader import EvalBatch
from mmscale.data.tokenizer import Tokenizer
from mmscale.evaluate.encoding import encode_own_texts
from mmscale.evaluate.ranks import gather_in_order, rank_and_world_size, sum_over_ranks
from mmscale.model.modeling_mmscale import MMScaleModel

TIE = 1e-6  # cosine similarities closer than this are equal: float32 sums of another order differ by about 1e-7
RECALLS = (1, 5, 10)
BLOCK_ROWS, BLOCK_COLUMNS = 2048, 8192  # 64 MiB of similarities at a time


class Retrieval:
    """The task in an evaluation: collects embeddings of pictures and captions, then ranks them against each other.

    After `finish`, `pairs` says among how many pictures, and `ranks` where each of them (by its position in the split)
    finds its best caption.
    """

    def __init__(self, model: MMScaleModel, tokenizer: Tokenizer, config: EvalConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.pairs = 0
        self.ranks: dict[int, float] = {}
        self._positions: list[int] = []
        self._captions: list[list[str]] = []
        self._images: list[Tensor] = []
        self._texts: list[Tensor] = []

    def add(self, batch: EvalBatch, pixel_values: Tensor, image_embeds: Tensor, image_tokens: Tensor) -> None:
        """Takes one batch; `image_embeds` is `[batch, dim]`."""
        rows = batch.valid.nonzero().flatten().tolist()
        self._positions += batch.positions[rows].tolist()
        self._captions += [batch.captions[row] for row in rows]
        self._images.append(image_embeds[rows])
        if not self.config.all_captions:
            device = image_embeds.device
            lengths = batch.lengths.clamp(min=1)  # a masked slot has no token; the tower wants at least one
            text_embeds, _ = self.model.encode_text(batch.input_ids.to(device), lengths=lengths.to(device))
            self._texts.append(text_embeds[rows].float())

    def finish(self) -> dict[str, float]:
        """The scores over all ranks. Collective."""
        images = torch.cat(self._images)
        if self.config.all_captions:
            own_texts = [text for captions in self._captions for text in captions]
            texts = encode_own_texts(self.model, self.tokenizer, own_texts, self.config.batch)
            owners = [p for p, captions in zip(self._positions, self._captions, strict=True) for _ in captions]
        else:
            texts, owners = torch.cat(self._texts), self._positions
        positions, (captions, images) = gather_in_order(self._positions, self._captions, images)
        owners, (texts,) = gather_in_order(owners, texts)
        if self.config.distinct_pairs:
            taken = distinct_pairs(captions, self.config.distinct_pairs)
        else:
            taken = list(range(len(positions)))
        self.pairs = len(taken)
        row_of = {positions[row]: new_row for new_row, row in enumerate(taken)}
        kept = [index for index, owner in enumerate(owners) if owner in row_of]
        image_of_text = torch.tensor([row_of[owners[index]] for index in kept], device=images.device)
        counts = count_above_and_tied(images[taken], texts[kept], image_of_text)
        above, tied, right = counts["image_to_text"]
        self.ranks = {positions[row]: rank for row, rank in zip(taken, _mean_rank(above, tied, right), strict=True)}
        return {"retrieval_pairs": len(taken)} | {f"retrieval_{name}": score for name, score in _scores(counts).items()}


def retrieval_scores(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank in both directions.

    Collective: every rank holds all embeddings, works on its own share of the image rows, and gets the same result.

    Args:
        image_embeds: `[images, dim]`, L2-normalised.
        text_embeds: `[texts, dim]`, L2-normalised.
        image_of_text: `[texts]`, the row of the picture that a text describes; every picture has at least one text.

    Returns:
        `image_to_text_r1` ... `text_to_image_r10` as fractions and `..._median_rank` (from 1).
    """
    return _scores(count_above_and_tied(image_embeds, text_embeds, image_of_text))


def _scores(counts: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, float]:
    scores = {}
    for direction, (above, tied, right) in counts.items():
        for k in RECALLS:
            scores[f"{direction}_r{k}"] = float(_hit_probability(above, tied, right, k).mean())
        scores[f"{direction}_median_rank"] = float(np.median(_mean_rank(above, tied, right)))
    return scores


def _mean_rank(above: np.ndarray, tied: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The rank, from 1, of the first right answer, on average over the orders of what ties with it."""
    return above + 1 + tied / (right + 1)


def count_above_and_tied(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What stands above and beside the best right answer of each query.

    Returns:
        For `image_to_text` and `text_to_image`: `(above, tied, right)`, int64 arrays with one entry a query: the wrong
        candidates that score higher than the best right one, the wrong ones that tie with it, and the right ones at
        that score (at least 1).
    """
    device = image_embeds.device
    pair_scores = torch.cat(
        [
            (image_embeds[image_of_text[start : start + 65536]] * text_embeds[start : start + 65536]).sum(1)
            for start in range(0, len(text_embeds), 65536)
        ]
    )
    best = torch.full((len(image_embeds),), -torch.inf, device=device, dtype=pair_scores.dtype)
    best = best.scatter_reduce(0, image_of_text, pair_scores, "amax")
    right = torch.zeros(len(image_embeds), dtype=torch.long, device=device)
    right.index_add_(0, image_of_text, (pair_scores >= best[image_of_text] - TIE).long())

    rank, world_size = rank_and_world_size()
    rows = range(rank * len(image_embeds) // world_size, (rank + 1) * len(image_embeds) // world_size)
    # Of each query: how many candidates are above its right answer, and how many are not below it, itself included.
    image_counts = torch.zeros(2, len(image_embeds), dtype=torch.long, device=device)
    text_counts = torch.zeros(2, len(text_embeds), dtype=torch.long, device=device)
    for row in range(rows.start, rows.stop, BLOCK_ROWS):
        images = slice(row, min(row + BLOCK_ROWS, rows.stop))
        add_counts(image_embeds[images], text_embeds, best[images], pair_scores, image_counts[:, images], text_counts)
    image_counts = sum_over_ranks(image_counts).cpu().numpy()
    text_counts = sum_over_ranks(text_counts).cpu().numpy()
    right = right.cpu().numpy()
    one = np.ones(len(text_embeds), dtype=np.int64)
    return {
        "image_to_text": (image_counts[0], np.maximum(image_counts[1] - image_counts[0] - right, 0), right),
        "text_to_image": (text_counts[0], np.maximum(text_counts[1] - text_counts[0] - one, 0), one),
    }


def add_counts(
    images: Tensor, texts: Tensor, best: Tensor, pair_scores: Tensor, image_counts: Tensor, text_counts: Tensor
) -> None:
    """Compares some pictures with all texts, and adds what it finds to both counts.

    Args:
        images, texts: `[rows, dim]` and `[texts, dim]`.
        best, pair_scores: `[rows]` and `[texts]`, the similarity of each query's best right answer.
        image_counts, text_counts: `[2, rows]` and `[2, texts]`, added to in place: candidates above the right answer,
            and candidates not below it.
    """
    for start in range(0, len(texts), BLOCK_COLUMNS):
        columns = slice(start, start + BLOCK_COLUMNS)
        similarity = images @ texts[columns].T
        for index, tolerance in enumerate((TIE, -TIE)):
            image_counts[index] += _count(similarity > best[:, None] + tolerance, dim=1)
            text_counts[index, columns] += _count(similarity > pair_scores[None, columns] + tolerance, dim=0)


def distinct_pairs(captions: Sequence[Sequence[str]], limit: int | None = None) -> list[int]:
    """The rows of pairs that cannot be mistaken for one another, in the order given.

    A pair is taken when none of its captions, compared without regard to case and spacing, belongs to one taken before:
    two pictures of the same scene share captions, and which of them a caption means nobody can tell.
    """
    seen: set[str] = set()
    taken: list[int] = []
    for row, texts in enumerate(captions):
        keys = {" ".join(text.lower().split()) for text in texts}
        if keys and seen.isdisjoint(keys):
            seen |= keys
            taken.append(row)
            if len(taken) == limit:
                break
    return taken


def _count(mask: Tensor, dim: int) -> Tensor:
    # NumPy counts the bytes of a mask an order of magnitude faster than torch does on a CPU.
    if mask.device.type == "cpu":
        return torch.from_numpy(np.asarray(np.count_nonzero(mask.numpy(), axis=dim)))
    return torch.count_nonzero(mask, dim=dim)


def _hit_probability(above: np.ndarray, tied: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """The chance that one of `right` equal answers is among the first k when it is shuffled with `tied` wrong ones."""
    places = np.clip(k - above, 0, None)
    miss = np.ones(len(above))
    for draw in range(k):  # the draw-th of the open places goes to a wrong answer, given that those before it did
        open_place = draw < places
        wrong_left, left = np.maximum(tied - draw, 0), np.maximum(tied + right - draw, 1)
        miss = np.where(open_place, miss * wrong_left / left, miss)
    return 1 - miss
