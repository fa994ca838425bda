"""The contrastive captioner (CoCa, https://arxiv.org/abs/2205.01917) as a Transformers model.

    MMScaleModel
      vision       VisionTower: patches, ViT blocks, attentional pooler, projection of query 0
      text         TextTower: tokens and CLS, causal blocks, projection of CLS
      decoder      Decoder: causal blocks interleaved with attention to the picture, and `decoder.head` (vocabulary)
      logit_scale  LogitScale: temperature (and bias) of the contrastive loss
      heads        TaskHead by name, where the configuration has any
      class_prompts ClassPrompts, where the configuration has any; further learned prompts lie in the parts they steer

The CLS token stands directly after the last token of its caption and carries the last row of the position table. Under
causal attention it sees its whole caption and itself, no token sees it, and what follows (padding) is seen by nothing
that is used: no mask is needed, and the result does not depend on how far a batch is padded.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .configuration_mmscale import MMScaleConfig
from .generation import CaptionGenerationMixin, Pictures
from .heads import TaskHeads, caption_likelihood
from .int8 import with_int8_layers
from .logit_scale import LogitScale
from .patch_dropout import kept_patches
from .prompts import ClassPrompts
from .recording import record_attentions, record_hidden_states
from .text_stacks import Decoder, TextTower
from .vision_tower import VisionTower


@dataclass
class MMScaleOutput(ModelOutput):
    """What `MMScaleModel.forward` returns; what the inputs do not allow is None.

    Attributes:
        loss: captioning cross entropy, mean over real tokens, when `labels` are given.
        logits: [batch, length, vocabulary], row t for the token after token t.
        image_embeds, text_embeds: [batch, embed_dim], of unit length.
        logits_per_image: [pictures, texts], cosine similarities times the logit scale (plus a bias, if any).
        logits_per_text: its transpose.
        image_tokens: [batch, picture tokens, embed_dim], what the decoder looks at.
        head_logits: per task head, [batch, outputs]; for the heads whose inputs are given.
        class_logits: [batch, classes], of a model with class prompts.
        past_key_values: the cache, when one is in use.
        hidden_states: per part (`vision`, `text`, `decoder`), the input of every block and the last output.
        attentions: per part, the weights of every attention layer (`attn_implementation="eager"`).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_tokens: Tensor | None = None
    head_logits: dict[str, Tensor] | None = None
    class_logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: dict[str, tuple[Tensor, ...]] | None = None
    attentions: dict[str, tuple[Tensor, ...]] | None = None


class MMScalePreTrainedModel(PreTrainedModel):
    config_class = MMScaleConfig
    base_model_prefix = ""
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Block", "CrossBlock", "AttentionalPooler"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if self.config.int8:
            return  # all weights are loaded
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters") and not isinstance(module, (nn.Linear, nn.Embedding)):
            module.reset_parameters()  # our modules know the scale of the linear layers they own

    def _initialize_weights(self, module: nn.Module, *args, **kwargs):
        # Without the flag for custom code, under which Transformers passes over every module that has no parameters of
        # its own, and so over the blocks. What was loaded from a file is left alone either way.
        super()._initialize_weights(module)


class MMScaleModel(CaptionGenerationMixin, MMScalePreTrainedModel, GenerationMixin):
    """Image tower, text tower, multimodal decoder and logit scale; the parts are described at the top of this file."""

    def __init__(self, config: MMScaleConfig):
        super().__init__(config)
        self.vision = VisionTower(config)
        self.text = TextTower(config)
        self.decoder = Decoder(config) if config.decoder_config.layers else None
        self.logit_scale = LogitScale(config)
        if config.heads:
            self.heads = TaskHeads(config)
        if config.class_prompts:
            self.class_prompts = ClassPrompts(config)
        if config.int8:
            with_int8_layers(self)
        self.post_init()

    def encode_image(self, pixel_values: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[batch, 3, height, width] (uint8, or floats already normalised) to what the two losses need.

        Returns:
            Embeddings [batch, embed_dim] of unit length, and picture tokens [batch, pooler queries - 1, embed_dim],
            with `patch_tokens` also one for each patch.
        """
        image_embeds, image_tokens = self.vision(pixel_values, keep)
        return F.normalize(image_embeds, dim=-1), image_tokens

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[batch, length], right-padded, to unit embeddings [batch, embed_dim] and states [batch, length, width].

        The number of real tokens comes from `lengths` [batch], else from `attention_mask` [batch, length], else from
        the pad id.
        """
        text_embeds, text_tokens = self.text(input_ids, self._lengths(input_ids, attention_mask, lengths))
        return F.normalize(text_embeds, dim=-1), text_tokens

    def decode(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Text states [batch, length, width] and picture tokens to states [batch, length, width] for the head."""
        return self._require_decoder()(text_tokens, image_tokens)

    def fuse(
        self, text_tokens: Tensor, lengths: Tensor, image_tokens: Tensor, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The decoder's state [batch, text width] at a text's last token, which has seen the text and its picture.

        With `input_ids` [batch, length] also how likely the text is as this picture's caption, [batch, 2].
        """
        states = self.decode(text_tokens, image_tokens)
        last = states[torch.arange(states.shape[0], device=states.device), lengths - 1]
        if input_ids is None:
            return last, None
        return last, caption_likelihood(self.decoder.head, states, input_ids, lengths)

    def get_image_features(self, pixel_values: Tensor, guide: Tensor | None = None) -> Tensor:
        """Embeddings of pictures, [batch, embed_dim], of unit length.

        Args:
            guide: [batch or 1, embed_dim], embeddings of texts such as "the colour", for a model with guided pooling;
                with several for each picture, [batch or 1, guides, embed_dim], there are so many of it.
        """
        return F.normalize(self.vision(pixel_values, tokens=False, guide=guide)[0], dim=-1)

    def class_logits(self, image_embeds: Tensor) -> Tensor:
        """Unit embeddings of pictures [batch, embed_dim] to logits [batch, classes], by the learned class prompts."""
        if not self.config.class_prompts:
            raise ValueError("this model has no class prompts (config.class_prompts)")
        class_embeds = self.class_prompts(self.text, image_embeds)
        cosines = torch.einsum("bd,bcd->bc" if class_embeds.ndim == 3 else "bd,cd->bc", image_embeds, class_embeds)
        return cosines * self.logit_scale()[0]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings of texts, [batch, embed_dim], of unit length."""
        return self.encode_text(input_ids, attention_mask)[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        labels: Tensor | None = None,
        pictures: Pictures | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> MMScaleOutput | tuple:
        """Embeds pictures and texts, and predicts each text's next tokens from its picture where both are given.

        Args:
            input_ids: [batch, length], right-padded.
            pixel_values: [batch, 3, height, width], uint8 or normalised floats.
            attention_mask, lengths: the real tokens, see `encode_text`.
            labels: [batch, length], usually `input_ids` themselves; position t is predicted from the tokens before it;
                -100 and padding count for nothing.
            pictures, past_key_values, logits_to_keep: used by `generate`.
            output_hidden_states, output_attentions: also return these; as the configuration says when None.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        hidden_states = {} if _chosen(output_hidden_states, self.config.output_hidden_states) else None
        attentions = {} if _chosen(output_attentions, self.config.output_attentions) else None
        parts = self._blocks_in_order()
        with record_hidden_states(parts, hidden_states), record_attentions(parts, attentions):
            if pictures is not None:
                logits = self._generation_step(input_ids, attention_mask, pictures, past_key_values, logits_to_keep)
                output = MMScaleOutput(logits=logits, past_key_values=past_key_values)
            else:
                output = self._match_and_caption(input_ids, pixel_values, attention_mask, lengths, labels)
        output.hidden_states, output.attentions = hidden_states, attentions
        return output if return_dict else output.to_tuple()

    def _match_and_caption(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        lengths: Tensor | None,
        labels: Tensor | None,
    ) -> MMScaleOutput:
        found = {}
        if pixel_values is not None:
            found["image_embeds"], found["image_tokens"] = self.encode_image(pixel_values)
            if self.config.class_prompts:
                found["class_logits"] = self.class_logits(found["image_embeds"])
        if input_ids is not None:
            lengths = self._lengths(input_ids, attention_mask, lengths)
            found["text_embeds"], text_tokens = self.encode_text(input_ids, lengths=lengths)
        if pixel_values is not None and input_ids is not None:
            scale, bias = self.logit_scale().unbind()
            found["logits_per_image"] = found["image_embeds"] @ found["text_embeds"].T * scale + bias
            found["logits_per_text"] = found["logits_per_image"].T
            if self.decoder is not None and pixel_values.shape[0] == input_ids.shape[0]:
                found["logits"] = self.decoder.head(self.decode(text_tokens, found["image_tokens"]))
                if labels is not None:
                    found["loss"] = _caption_loss(found["logits"], labels, lengths)
        if self.config.heads:
            names = ("image_embeds", "image_tokens", "text_embeds")
            found["head_logits"] = self.heads(
                **{name: found.get(name) for name in names},
                fuse=lambda likely: self.fuse(
                    text_tokens, lengths, found["image_tokens"], input_ids if likely else None
                ),
            )
        return MMScaleOutput(**found)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text.tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.text.tokens = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.decoder.head if self.decoder is not None else None

    def kept_patches(self, positions: Tensor, seed: int) -> Tensor | None:
        """The patches that patch dropout leaves of the samples at these stream positions; None for all of them."""
        vision = self.config.vision_config
        if not (self.training and vision.patch_dropout):
            return None
        keep = max(1, round(vision.num_patches * (1 - vision.patch_dropout)))
        return kept_patches(positions, vision.num_patches, keep, seed)

    def set_activation_checkpointing(self, mode: str):
        """Which blocks are recomputed in the backward pass: `none`, `full`, or `every_N` (N-th of a part)."""
        every = {"none": 0, "full": 1}.get(mode)
        if every is None:
            prefix, _, number = mode.rpartition("_")
            if prefix != "every" or not number.isdigit() or int(number) < 1:
                raise ValueError(f"checkpoint: `{mode}` is not one of none, full, every_N")
            every = int(number)
        for blocks in self._block_stacks():
            for index, block in enumerate(blocks):
                block.gradient_checkpointing = bool(every) and index % every == every - 1
                block._gradient_checkpointing_func = partial(activation_checkpoint, use_reentrant=False)

    def compile_blocks(self, **options):
        """Compiles every block in place; blocks of a stack share one compiled graph. Options are `torch.compile`'s.

        Texts come in another number of tokens with every batch, pictures always in the same.
        """
        for blocks in self._block_stacks():
            for block in blocks:
                block.compile(dynamic=blocks is not self.vision.blocks, **options)

    def _block_stacks(self) -> list[nn.ModuleList]:
        decoder = [self.decoder.blocks, self.decoder.cross_blocks] if self.decoder is not None else []
        return [self.vision.blocks, self.text.blocks, *decoder]

    def _blocks_in_order(self) -> dict[str, list[nn.Module]]:
        parts = {"vision": list(self.vision.blocks), "text": list(self.text.blocks)}
        if self.decoder is not None:
            pairs = zip(self.decoder.blocks, self.decoder.cross_blocks, strict=True)
            parts["decoder"] = [block for pair in pairs for block in pair]
        return parts

    def _lengths(self, input_ids: Tensor, attention_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        if lengths is not None:
            return lengths
        real = attention_mask if attention_mask is not None else input_ids != self.config.pad_token_id
        return real.long().sum(1)

    def _require_decoder(self) -> Decoder:
        if self.decoder is None:
            raise ValueError("this model has no decoder (decoder.layers is 0): it can embed, but not write captions")
        return self.decoder


def _chosen(asked: bool | None, default: bool) -> bool:
    return default if asked is None else asked


def _caption_loss(logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """Mean cross entropy of the next token over real tokens."""
    position = torch.arange(1, labels.shape[1], device=labels.device)
    targets = labels[:, 1:].masked_fill(position >= lengths[:, None], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
