"""What a score owes to each patch of a picture and to each word of a text: how much it loses without it.

A patch is covered with the mean colour, as in https://arxiv.org/abs/1311.2901 (section 4.1); a word is left out. This
asks of the model only what it does anyway: it goes through every layer between the pixels and the score, the pooler and
the cross-attention included, and works with any attention kernel and with 8-bit weights. All scores of a picture share
one pass over its covered copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.data.tokenizer import Tokenizer
from mmscale.evaluate.encoding import encode_own_texts, model_device, pad_tokens
from mmscale.model.modeling_mmscale import MMScaleModel


@dataclass
class Covered:
    """A picture through the model: as it is in row 0, then with one part covered in each row.

    Attributes:
        image_embeds: [1 + parts, embed_dim]. image_tokens: [1 + parts, picture tokens, embed_dim].
        grid: rows and columns of the parts.
    """

    image_embeds: Tensor
    image_tokens: Tensor
    grid: tuple[int, int]

    def relevance(self, scores: Tensor) -> Tensor:
        """[rows, columns]: what each part adds to a score, of the scores [1 + parts] of all copies."""
        return (scores[0] - scores[1:]).view(self.grid).cpu()


@torch.no_grad()
def cover(model: MMScaleModel, pixels: Tensor, window: int = 1, batch: int = 64) -> Covered:
    """Encodes a picture and its covered copies.

    Args:
        pixels: uint8 [3, height, width].
        window: patches, each way, that are covered together; the windows lie side by side.
        batch: copies of a forward pass.
    """
    size = model.config.vision_config.patch_size * window
    rows, columns = (-(-side // size) for side in pixels.shape[1:])
    mean = (torch.tensor(model.config.image_mean) * 255).round().to(torch.uint8)[:, None, None]
    copies = pixels.repeat(1 + rows * columns, 1, 1, 1)
    for part in range(rows * columns):
        top, left = part // columns * size, part % columns * size
        copies[1 + part, :, top : top + size, left : left + size] = mean
    device = model_device(model)
    found = [model.encode_image(some.to(device)) for some in copies.split(batch)]
    embeds, tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Covered(embeds.float(), tokens, (rows, columns))


def matching_relevance(covered: Covered, text_embed: Tensor) -> Tensor:
    """Of the cosine similarity to a text, whose embedding is [embed_dim]: [rows, columns]."""
    return covered.relevance(covered.image_embeds @ text_embed)


def class_relevance(covered: Covered, class_embeds: Tensor, scale: float) -> tuple[int, Tensor]:
    """The likeliest class, and the relevance [rows, columns] of its log-probability.

    Args:
        class_embeds: [classes, embed_dim] of unit length. scale: the logit scale.
    """
    logs = (scale * covered.image_embeds @ class_embeds.T).log_softmax(1)
    best = int(logs[0].argmax())
    return best, covered.relevance(logs[:, best])


def caption_relevance(
    model: MMScaleModel, tokenizer: Tokenizer, covered: Covered, words: Sequence[str]
) -> list[Tensor]:
    """Of the log-probability of every word of a caption, given the words before it: [rows, columns] for each."""
    logs = word_log_probabilities(model, tokenizer, [list(words)] * len(covered.image_embeds), covered.image_tokens)
    return [covered.relevance(torch.stack([row[number] for row in logs])) for number in range(len(words))]


def matching_word_relevance(
    model: MMScaleModel, tokenizer: Tokenizer, image_embed: Tensor, words: Sequence[str]
) -> list[float]:
    """What each word adds to the cosine similarity of a text and a picture, whose embedding is [embed_dim]."""
    texts = [" ".join(words), *(" ".join(left) for left in _each_left_out(words))]
    scores = encode_own_texts(model, tokenizer, texts, len(texts)) @ image_embed
    return (scores[0] - scores[1:]).tolist()


def caption_word_relevance(
    model: MMScaleModel, tokenizer: Tokenizer, image_tokens: Tensor, words: Sequence[str]
) -> Tensor:
    """[words, words]: in row i, column j, what word j adds to the log-probability of the later word i; 0 elsewhere.

    Args:
        image_tokens: of one picture, [picture tokens, embed_dim].
    """
    captions = [list(words), *_each_left_out(words)]
    logs = word_log_probabilities(model, tokenizer, captions, image_tokens.expand(len(captions), -1, -1))
    found = torch.zeros(len(words), len(words))
    for left_out in range(len(words)):
        for word in range(left_out + 1, len(words)):
            found[word, left_out] = logs[0][word] - logs[1 + left_out][word - 1]
    return found


@torch.no_grad()
def word_log_probabilities(
    model: MMScaleModel, tokenizer: Tokenizer, captions: Sequence[list[str]], image_tokens: Tensor
) -> list[Tensor]:
    """Of every caption, each word's log-probability given its picture and the words before it.

    A word that the context cuts off has 0.

    Args:
        image_tokens: [captions, picture tokens, embed_dim].
    """
    context_length, device = model.config.text_config.context_length, image_tokens.device
    ids = [tokenizer.encode(" ".join(words), context_length) for words in captions]
    input_ids, lengths = (part.to(device) for part in pad_tokens(ids, tokenizer.pad_id, context_length))
    _, text_tokens = model.encode_text(input_ids, lengths=lengths)
    logits = model.decoder.head(model.decode(text_tokens, image_tokens))
    logs = logits[:, :-1].float().log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0].cpu()
    found = []
    for row, words in enumerate(captions):
        # Pieces do not reach over a space, so the pieces of a caption are those of its words.
        sizes = [len(tokenizer.encode(word, context_length)) - 2 for word in words]
        ends = torch.tensor(sizes, dtype=torch.long).cumsum(0).tolist()
        limit = int(lengths[row]) - 2
        starts = [end - size for end, size in zip(ends, sizes, strict=True)]
        spans = [(min(start, limit), min(end, limit)) for start, end in zip(starts, ends, strict=True)]
        found.append(torch.tensor([float(logs[row, start:end].sum()) for start, end in spans]))
    return found


def _each_left_out(words: Sequence[str]) -> list[list[str]]:
    return [[*words[:number], *words[number + 1 :]] for number in range(len(words))]
