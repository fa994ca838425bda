"""Scores of pictures for classes in words: by the distance of embeddings, or by the decoder's likelihood."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.adapt.prompts.pictures import Pictures
from mmscale.adapt.prompts.templates import SLOT
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.encoding import model_device, pad_tokens
from mmscale.evaluate.zeroshot import class_embeddings
from mmscale.model.modeling_mmscale import MMScaleModel

TEXTS = 64  # in one pass of the text tower


class ContrastiveScorer:
    """Log scores from the distance between a picture and sentences: cosines times the logit scale."""

    needs_tokens = False

    def __init__(self, model: MMScaleModel, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, pictures: Pictures, words: Sequence[str], templates: Sequence[str]) -> Tensor:
        """[pictures, words]; several templates are averaged as embeddings. Collective."""
        embeds = self.class_embeds(words, templates).cpu()
        return pictures.image_embeds @ embeds.T * float(self.model.logit_scale()[0].detach())

    @torch.no_grad()
    def class_embeds(self, words: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit embeddings [words, embed_dim]. Collective."""
        return class_embeddings(self.model, self.tokenizer, words, templates, TEXTS)


class CaptionScorer:
    """Log scores from the decoder: how likely a picture's caption is a template with the word in its place.

    The words of the template that come before the class word are given, what follows is counted.
    """

    needs_tokens = True
    batch = 256  # pairs of picture and sentence in one pass

    def __init__(self, model: MMScaleModel, tokenizer: Tokenizer):
        if model.decoder is None:
            raise UserError("adapt.prompts.scorer: caption needs a model with a decoder; take contrastive")
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, pictures: Pictures, words: Sequence[str], templates: Sequence[str]) -> Tensor:
        """[pictures, words]; several templates are averaged as probabilities."""
        each = [self._of_template(pictures.image_tokens, words, template) for template in templates]
        return torch.stack([scores.log_softmax(1) for scores in each]).logsumexp(0)

    def _of_template(self, image_tokens: Tensor, words: Sequence[str], template: str) -> Tensor:
        device, context_length = model_device(self.model), self.model.config.text_config.context_length
        sentences = [self.tokenizer.encode(template.replace(SLOT, word), context_length) for word in words]
        given = len(self.tokenizer.encode(template.split(SLOT)[0].rstrip(), context_length)) - 1
        input_ids, lengths = (part.to(device) for part in pad_tokens(sentences, self.tokenizer.pad_id, context_length))
        _, text_tokens = self.model.encode_text(input_ids, lengths=lengths)
        place = torch.arange(1, input_ids.shape[1], device=device)
        counted = (place >= given) & (place < lengths[:, None])
        rows = []
        for part in image_tokens.split(max(1, self.batch // len(words))):
            pairs = part.to(device).repeat_interleave(len(words), 0)
            logits = self.model.decoder.head(self.model.decode(text_tokens.repeat(len(part), 1, 1), pairs))[:, :-1]
            targets = input_ids[:, 1:].repeat(len(part), 1)
            logs = -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            rows.append((logs.view(len(part), len(words), -1) * counted).sum(2).cpu())
        return torch.cat(rows)


SCORERS = {"contrastive": ContrastiveScorer, "caption": CaptionScorer}
