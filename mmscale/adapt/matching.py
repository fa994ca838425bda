"""Does this text describe this picture? A head that is trained on the pairs which the embeddings confuse.

Every pair of a micro-batch is set against three that do not match: the picture with the text nearest to it among the
others, the text with the picture nearest to it (https://arxiv.org/abs/2107.07651, section 3.2), and the picture with
its own text in which one word has been exchanged (`swaps`; https://arxiv.org/abs/2210.01936, section 4).
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from sklearn import metrics
from torch import Tensor
from torch.nn import functional as F

from mmscale.adapt.config import HeadTask
from mmscale.adapt.objective import Encoded, masked_sum, pad_ids
from mmscale.adapt.predictions import Outcome, head_scores
from mmscale.data.batches import LabelledBatch
from mmscale.data.loader import EvalSet
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.ranks import gather_in_order
from mmscale.model.modeling_mmscale import MMScaleModel

RERANKED = 512  # pairs of a split among which retrieval is scored again


class Matching:
    """The task; its head `model.heads[name]` has one score: above 0 where picture and text belong together."""

    def __init__(self, name: str, task: HeadTask, tokenizer: Tokenizer, context_length: int, seed: int):
        self.name, self.weight = name, task.weight
        self.outcome: Outcome | None = None
        self._source, self._rerank = task.source, task.rerank
        self._tokenizer, self._context_length, self._seed = tokenizer, context_length, seed
        self._alternatives = alternatives(task.swaps)

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        valid = batch.valid.clone()
        if self._source is not None:
            valid &= torch.tensor(batch.sources) == self._source
        texts = [self._tokenizer.decode(ids.tolist()) for ids in batch.input_ids]
        swapped_ids, swapped_lengths, swapped = self._swapped(texts, batch.positions.tolist())
        others = ~same_scenes(texts, batch.captions) & valid[:, None] & valid
        has_other = others.any(1)
        return {
            "valid": valid,
            "others": others,
            "has_other": has_other,
            "swapped_ids": swapped_ids,
            "swapped_lengths": swapped_lengths,
            "swapped": swapped & valid,
            "count": valid.sum() + 2 * has_other.sum() + (swapped & valid).sum(),
        }

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        # Not under no_grad: what `encoded` computes there would be kept without its gradient.
        similar = encoded.image_embeds.detach() @ encoded.text_embeds.detach().T
        similar = similar.masked_fill(~inputs["others"], -torch.inf)
        text, image = similar.argmax(1), similar.argmax(0)
        matching = head_scores(model, self.name, encoded)
        loss = masked_sum(F.softplus(-matching[:, 0].float()), inputs["valid"])
        for pairs, mask in (
            (encoded.paired(texts=text), inputs["has_other"]),
            (encoded.paired(images=image), inputs["has_other"]),
            (encoded.with_text(inputs["swapped_ids"], inputs["swapped_lengths"]), inputs["swapped"]),
        ):
            loss = loss + masked_sum(F.softplus(head_scores(model, self.name, pairs)[:, 0].float()), mask)
        return loss

    @torch.no_grad()
    def evaluate(self, model: MMScaleModel, split: EvalSet) -> dict[str, float]:
        """`auc` of pairs that match against the same with one word exchanged (without `swaps`, against the next
        sample's text); `image_to_text_r1` of retrieval, and `reranked_image_to_text_r1`."""
        device, positions, keys = model_device(model), [], []
        columns: dict[str, list] = {name: [] for name in ("matching", "other", "has_other", "image", "tokens")}
        texts: list[str] = []
        captions: list[list[str]] = []
        for batch in split:
            encoded = Encoded.of(model, batch)
            words = [self._tokenizer.decode(ids.tolist()) for ids in batch.input_ids]
            ids, lengths, swapped = self._swapped(words, batch.positions.tolist())
            if not self._alternatives:
                ids, lengths, swapped = batch.input_ids.roll(1, 0), batch.lengths.roll(1, 0).clamp(min=1), batch.valid
            other = encoded.with_text(ids.to(device), lengths.to(device))
            rows = batch.valid.nonzero().flatten()
            positions += batch.positions[rows].tolist()
            keys += [batch.keys[row] for row in rows.tolist()]
            texts += [words[row] for row in rows.tolist()]
            captions += [batch.captions[row] for row in rows.tolist()]
            for name, value in (
                ("matching", head_scores(model, self.name, encoded)[:, 0].float()),
                ("other", head_scores(model, self.name, other)[:, 0].float()),
                ("has_other", swapped.to(device)),
                ("image", encoded.image_embeds.float()),
                ("tokens", encoded.image_tokens.float()),
            ):
                columns[name].append(value[rows.to(device)])
        names = list(columns)
        _, gathered = gather_in_order(positions, keys, texts, captions, *(torch.cat(columns[name]) for name in names))
        keys, texts, captions = gathered[:3]
        found = dict(zip(names, gathered[3:], strict=True))
        negative = found["other"][found["has_other"]]
        if not len(negative):
            raise UserError(f"adapt.heads.{self.name}.swaps: none of these words is in the split's captions")
        scores = torch.cat([found["matching"], negative]).cpu().numpy()
        targets = np.array([1] * len(found["matching"]) + [0] * len(negative))
        self.outcome = Outcome(keys, targets, scores)
        scored = {
            "auc": float(metrics.roc_auc_score(targets, scores)),
            "accuracy": float(metrics.accuracy_score(targets, scores > 0)),
            **self._retrieval(model, found, texts, captions),
        }
        return {f"{self.name}_{score}": value for score, value in scored.items()}

    def _retrieval(
        self, model: MMScaleModel, found: dict[str, Tensor], texts: list[str], captions_of: list[list[str]]
    ) -> dict[str, float]:
        """R@1 by the embeddings alone and with the best scored again by the head; among pairs that share no caption."""
        rows, seen = [], set()
        for row, captions in enumerate(captions_of):
            if len(rows) < RERANKED and seen.isdisjoint(captions):
                rows.append(row)
            seen.update(captions)
        image = tuple(found[name][rows] for name in ("image", "tokens"))
        token_ids = [self._tokenizer.encode(texts[row], self._context_length) for row in rows]
        ids, lengths = (tensor.to(image[0].device) for tensor in pad_ids(token_ids, self._tokenizer.pad_id))
        encoded = Encoded(model, input_ids=ids, lengths=lengths, image=image)
        similar = encoded.image_embeds @ encoded.text_embeds.float().T * model.logit_scale()[0]
        right = torch.arange(len(rows), device=ids.device)
        scores = {}
        for name, table, transposed in (("image_to_text", similar, False), ("text_to_image", similar.T, True)):
            best = table.topk(min(self._rerank, len(rows)), 1).indices
            fused = torch.empty_like(best, dtype=torch.float32)
            for place in range(best.shape[1]):
                images, captions = (best[:, place], right) if transposed else (right, best[:, place])
                pairs = encoded.paired(images, captions)
                fused[:, place] = head_scores(model, self.name, pairs)[:, 0].float()
            fused += table.gather(1, best).log_softmax(1)
            again = best.gather(1, fused.argmax(1, keepdim=True))[:, 0]
            scores[f"{name}_r1"] = float((best[:, 0] == right).float().mean())
            scores[f"reranked_{name}_r1"] = float((again == right).float().mean())
        return scores

    def _swapped(self, texts: Sequence[str], positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and lengths of the texts with one word exchanged, and bool [texts]: whether there was one to exchange."""
        swapped = [
            swap_word(text, self._alternatives, random.Random(f"{self._seed}/{position}"))
            for text, position in zip(texts, positions, strict=True)
        ]
        ids, lengths = pad_ids(
            [self._tokenizer.encode(text or "", self._context_length) for text in swapped], self._tokenizer.pad_id
        )
        return ids, lengths, torch.tensor([text is not None for text in swapped])


def same_scenes(texts: Sequence[str], captions: Sequence[Sequence[str]]) -> Tensor:
    """bool [batch, batch]: whether one row's text is the text, or a caption, of the other; each row is its own."""
    rows_of: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows_of.setdefault(text, []).append(row)
    same = torch.eye(len(texts), dtype=torch.bool)
    for row, (text, own) in enumerate(zip(texts, captions, strict=True)):
        for other in {other for caption in (text, *own) for other in rows_of.get(caption, ())}:
            same[row, other] = same[other, row] = True
    return same


def alternatives(swaps: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """word -> the words that may stand in its place. Raises UserError for a word in two lists."""
    found: dict[str, list[str]] = {}
    for words in swaps:
        for word in words:
            if word in found:
                raise UserError(f"adapt.heads: swaps: `{word}` stands in two lists")
            found[word] = [other for other in words if other != word]
    return {word: others for word, others in found.items() if others}


def swap_word(text: str, choices: dict[str, list[str]], draw: random.Random) -> str | None:
    """The text with one of its words exchanged; None where it has none of them."""
    words = text.split()
    places = [place for place, word in enumerate(words) if word in choices]
    if not places:
        return None
    place = draw.choice(places)
    words[place] = draw.choice(choices[words[place]])
    return " ".join(words)
