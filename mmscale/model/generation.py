"""Writing captions through Transformers' `generate`.

One cache spans the text tower and the decoder. Pictures are encoded once, their keys and values are computed once (or
never, where that is cheaper), and kept outside the tensors that beam search repeats: the beams of a picture share them.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .layers import few_queries
from .linear import packed_weights


@dataclass
class Pictures:
    """What decoding needs of the pictures, one of two.

    Attributes:
        keys_values: for every decoder layer, keys and values [pictures, heads, tokens, size]: for many steps or beams.
        context: standardised picture tokens [pictures, tokens, embed_dim]: a short caption needs no keys and values.
    """

    keys_values: list[tuple[Tensor, Tensor]] | None = None
    context: Tensor | None = None


class CaptionGenerationMixin:
    """`generate` and what Transformers' `GenerationMixin` asks of a model."""

    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_tokens: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Captions for pictures.

        Args:
            input_ids: prompts [pictures, length] that the captions go on from, left-padded with an `attention_mask`
                where lengths differ; the start token alone when None. One prompt may serve all pictures.
            pixel_values: [pictures, 3, height, width].
            image_tokens: what `encode_image` made of the pictures before, in place of `pixel_values`.
            kwargs: as for Transformers' `generate` (num_beams, do_sample, top_p, max_new_tokens, ...). Without a
                length, captions may fill the context.

        Returns:
            Token ids [pictures, length] with the prompt, the start and the end token.
        """
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        if pixel_values is None and image_tokens is None:
            raise ValueError("generate needs pixel_values or image_tokens: it writes captions for pictures")
        with torch.no_grad():
            if image_tokens is None:
                _, image_tokens = self.vision(pixel_values, embed=False)
            self._require_decoder()
        if input_ids is None:
            input_ids = torch.full((1, 1), self.config.bos_token_id, device=image_tokens.device)
        if input_ids.shape[0] == 1:
            input_ids = input_ids.expand(len(image_tokens), -1)
        context = self.config.text_config.context_length
        config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("max_new_tokens") is None and config.max_new_tokens is None:
            kwargs.setdefault("max_length", min(config.max_length or context, context))
        elif input_ids.shape[1] + (kwargs.get("max_new_tokens") or config.max_new_tokens) > context:
            raise ValueError(
                f"max_new_tokens: a prompt of {input_ids.shape[1]} tokens leaves room for "
                f"{context - input_ids.shape[1]} more in a context of {context}"
            )
        if kwargs.get("use_cache", config.use_cache) is not False:
            kwargs.setdefault("past_key_values", DynamicCache())
        longest = kwargs.get("max_length") or (kwargs.get("max_new_tokens") or config.max_new_tokens)
        pictures = self._prepare_pictures(image_tokens, longest * (kwargs.get("num_beams") or config.num_beams or 1))
        with self.packed_for_generation():
            return super().generate(input_ids, pictures=pictures, **kwargs)

    def packed_for_generation(self) -> AbstractContextManager[None]:
        """While this is open, calls of `generate` share what each would make of the weights: see `packed_weights`."""
        return packed_weights(self.text, self.decoder)

    @torch.no_grad()
    def _prepare_pictures(self, image_tokens: Tensor, queries: int) -> Pictures:
        decoder, width = self._require_decoder(), self.config.text_config.width
        if few_queries(queries, *image_tokens.shape[1:2], width, self.config.embed_dim, decoder.config.heads):
            return Pictures(context=decoder.standardise(image_tokens))
        return Pictures(keys_values=decoder.keys_values(image_tokens))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Cache | None = None, attention_mask: Tensor | None = None, **kwargs
    ) -> dict:
        """The tokens that the cache does not hold yet, and the mask over all of them."""
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pictures": kwargs["pictures"],
            "past_key_values": past_key_values,
            "logits_to_keep": 1,
        }

    def _generation_step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pictures: Pictures,
        past_key_values: Cache | None,
        logits_to_keep: int,
    ) -> Tensor:
        """Logits for the tokens in `input_ids`, which stand behind those in the cache. CLS is left out."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = input_ids.shape[1]
        positions = torch.arange(past, past + length, device=input_ids.device)
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            # Transformers lets a rank that has finished step on beside the others, and its mask grow without tokens.
            attention_mask = attention_mask[:, : past + length]
            # Left-padded prompts: positions count real tokens, and pads are seen by themselves only, for want of
            # anything else (a row of attention that sees nothing is not a number).
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
            total = past + length
            causal = torch.ones(length, total, dtype=torch.bool, device=input_ids.device).tril(past)
            itself = torch.eye(length, total, dtype=torch.bool, device=input_ids.device).roll(past, 1)
            mask = (causal & attention_mask.bool()[:, None, None, :]) | itself
        _, states = self.text(input_ids, positions=positions, mask=mask, past_key_values=past_key_values)
        hidden = self._require_decoder()(
            states, None, pictures.keys_values, pictures.context, mask=mask, past_key_values=past_key_values
        )
        return self.decoder.head(hidden[:, -logits_to_keep:])
