"""Task heads: scores for classes or numbers, from a picture, a text, or both."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from .layers import init_linear

FUSIONS = ("image", "text", "concat", "gated", "cross_attention")


class TaskHead(nn.Module):
    """One task's head on top of the towers; what it sees of a sample depends on `fusion`.

        image            the embedding, and the picture tokens under one learned query
        text             the embedding
        concat           both of these side by side, and their product
        gated            a mixture of both, weighted for each feature (https://arxiv.org/abs/1702.01992, section 3.1)
        cross_attention  the multimodal decoder's state at the text's last token, which has seen text and picture

    With `likelihood` a head on the decoder also sees how likely the text is as this picture's caption: the mean and the
    smallest log-probability of its tokens. One wrong word makes one token unlikely.

    Args:
        config: an MMScaleConfig.
        fusion: one of these.
        outputs: scores of a sample: classes, or numbers.
        hidden: width of a hidden layer; 0 for a linear head.
    """

    def __init__(self, config, fusion: str, outputs: int, hidden: int = 0, likelihood: bool = False):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion: `{fusion}` is not one of {', '.join(FUSIONS)}")
        if fusion == "cross_attention" and not config.decoder_config.layers:
            raise ValueError("fusion: cross_attention needs a model with a decoder")
        if likelihood and fusion != "cross_attention":
            raise ValueError("likelihood: only a head with the fusion cross_attention sees it")
        self.fusion, width = fusion, config.embed_dim
        if self.uses_image:
            self.query = nn.Parameter(torch.empty(width))
            self.norm_image = nn.LayerNorm(2 * width)
        if self.uses_text:
            self.norm_text = nn.LayerNorm(width)
        size = {"image": 2 * width, "text": width, "concat": 4 * width}.get(fusion, width)
        if fusion == "concat":
            self.match = nn.Linear(2 * width, width)
        elif fusion == "gated":
            self.from_image, self.from_text = nn.Linear(2 * width, width), nn.Linear(width, width)
            self.gate = nn.Linear(3 * width, width)
        elif fusion == "cross_attention":
            size = config.text_config.width
            self.norm_fused = nn.LayerNorm(size)
        self.hidden = nn.Linear(size, hidden) if hidden else None
        self.out = nn.Linear(hidden or size, outputs)
        self.likelihood = nn.Linear(2, outputs, bias=False) if likelihood else None

    @property
    def uses_image(self) -> bool:
        return self.fusion in ("image", "concat", "gated")

    @property
    def uses_text(self) -> bool:
        return self.fusion in ("text", "concat", "gated")

    @property
    def uses_decoder(self) -> bool:
        return self.fusion == "cross_attention"

    def forward(
        self,
        image_embeds: Tensor | None = None,
        image_tokens: Tensor | None = None,
        text_embeds: Tensor | None = None,
        fused: Tensor | None = None,
        likelihood: Tensor | None = None,
    ) -> Tensor:
        """Scores [batch, outputs].

        Args:
            image_embeds, text_embeds: [batch, embed_dim], of unit length.
            image_tokens: [batch, tokens, embed_dim].
            fused: [batch, text width], the decoder's state at the last token; for `cross_attention`.
            likelihood: [batch, 2], see `caption_likelihood`.
        """
        if self.uses_decoder:
            x = self.norm_fused(fused)
        else:
            image = self._image(image_embeds, image_tokens) if self.uses_image else None
            text = self.norm_text(text_embeds * text_embeds.shape[-1] ** 0.5) if self.uses_text else None
            x = self._fuse(image, text)
        if self.hidden is not None:
            x = torch.nn.functional.gelu(self.hidden(x))
        scores = self.out(x)
        return scores if self.likelihood is None else scores + self.likelihood(likelihood.to(x.dtype))

    def _image(self, image_embeds: Tensor, image_tokens: Tensor) -> Tensor:
        weights = (image_tokens @ self.query / math.sqrt(self.query.shape[0])).softmax(-1)
        pooled = torch.einsum("bt,btw->bw", weights, image_tokens)
        return self.norm_image(torch.cat([image_embeds * image_embeds.shape[-1] ** 0.5, pooled], dim=-1))

    def _fuse(self, image: Tensor | None, text: Tensor | None) -> Tensor:
        if image is None or text is None:
            return image if text is None else text
        if self.fusion == "concat":
            return torch.cat([image, text, self.match(image) * text], dim=-1)
        gate = self.gate(torch.cat([image, text], dim=-1)).sigmoid()
        return gate * self.from_image(image).tanh() + (1 - gate) * self.from_text(text).tanh()

    def reset_parameters(self):
        # Each tensor once: while a model is built, Transformers leaves alone what has been initialised before.
        if self.uses_image:
            nn.init.normal_(self.query)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            if linear is self.out:  # all answers are alike at the start
                init_linear(linear, 0.01 * linear.in_features**-0.5)
            elif linear is self.likelihood:
                nn.init.constant_(linear.weight, 0.5)
            else:
                init_linear(linear, linear.in_features**-0.5)


class TaskHeads(nn.ModuleDict):
    """All heads of a model by name, as `config.heads` describes them: `kind`, `fusion`, `labels`, `hidden`."""

    def __init__(self, config):
        super().__init__()
        for name, head in config.heads.items():
            outputs = len(head["labels"]) if head["kind"] in ("classification", "multilabel") else 1
            self[name] = TaskHead(config, head["fusion"], outputs, head["hidden"], head["likelihood"])

    def forward(
        self,
        image_embeds: Tensor | None,
        image_tokens: Tensor | None,
        text_embeds: Tensor | None,
        fuse: Callable[[bool], tuple[Tensor, Tensor | None]],
    ) -> dict[str, Tensor]:
        """Scores by name, of the heads whose inputs are given.

        `fuse` makes the decoder's state where one needs it, and with True the likelihood.
        """
        paired = image_embeds is not None and text_embeds is not None and len(image_embeds) == len(text_embeds)
        fused, scores = (None, None), {}
        likely = any(head.likelihood is not None for head in self.values())
        for name, head in self.items():
            alone = {"image": image_embeds, "text": text_embeds}.get(head.fusion)
            if alone is not None or paired:
                fused = fuse(likely) if head.uses_decoder and fused[0] is None else fused
                scores[name] = head(image_embeds, image_tokens, text_embeds, *fused)
        return scores


def caption_likelihood(vocabulary: nn.Module, states: Tensor, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """[batch, 2]: mean and smallest log-probability of a text's tokens after the first.

    The logits of a few rows are held at a time, and made once more in the backward pass.

    Args:
        vocabulary: the vocabulary head. states: the decoder's [batch, length, width]. input_ids: [batch, length].
        lengths: [batch], real tokens.
    """
    rows = max(1, (1 << 24) // (vocabulary.out_features * states.shape[1]))
    parts = zip(states.split(rows), input_ids.split(rows), lengths.split(rows), strict=True)
    return torch.cat([activation_checkpoint(_likelihood, vocabulary, *part, use_reentrant=False) for part in parts])


def _likelihood(vocabulary: nn.Module, states: Tensor, input_ids: Tensor, lengths: Tensor) -> Tensor:
    logits = vocabulary(states[:, :-1]).float()
    likely = logits.gather(2, input_ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    real = torch.arange(1, states.shape[1], device=states.device) < lengths[:, None]
    likely = likely.masked_fill(~real, 0.0)
    return torch.stack([likely.sum(1) / real.sum(1).clamp(min=1), likely.amin(1)], dim=1)
