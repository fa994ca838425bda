"""What `mmscale caption` does: captions for pictures on disk, in folders, at URLs and in shards."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mmscale.errors import UserError
from mmscale.evaluate.captioning import generate_captions
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.gallery import draw_captions
from mmscale.evaluate.pictures import Picture, batched, read_pictures
from mmscale.pretrained import Pretrained, load_pretrained

MOST_DRAWN = 64


def caption_command(
    model: str | Path,
    sources: Sequence[str],
    *,
    limit: int | None = None,
    output: str | Path | None = None,
    picture: str | Path | None = None,
    beams: int = 1,
    top_p: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 32,
    tokenizer: str | Path | None = None,
    ema: bool = False,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Writes a caption for every picture; greedy unless `beams` or `top_p` say otherwise.

    Args:
        model: a run, a checkpoint or an exported folder.
        sources: image files, folders, URLs and `.tar` shards.
        limit: only the first so many pictures.
        output: a file for one JSON object a picture (`name`, `caption`, and `references` where there are some).
        picture: a PNG file for the pictures with their captions, the first 64 of them.
        beams: of beam search; 1 is greedy.
        top_p: draw from the likeliest tokens that make up so much probability, instead of taking the best.
        temperature, seed: of the draws.
        batch: pictures at a time.
        say: takes one line a picture.

    Raises:
        UserError: no such model or picture; a model without a decoder.
    """
    pretrained = load_pretrained(model, device=device, tokenizer=tokenizer, ema=ema)
    if not pretrained.model.config.decoder_config.layers:
        raise UserError(f"{pretrained.path}: this model has no decoder, so it cannot write captions")
    options = {"num_beams": beams}
    if top_p is not None:
        options |= {"do_sample": True, "top_p": top_p, "temperature": temperature}
        torch.manual_seed(seed)
    captioned: list[tuple[Picture, str]] = []
    for found, caption in caption_pictures(pretrained, read_pictures(sources, pretrained, limit), batch, **options):
        say(f"{found.name}\t{caption}")
        captioned.append((found, caption))
    if output is not None:
        lines = [
            {"name": found.name, "caption": caption} | ({"references": found.captions} if found.captions else {})
            for found, caption in captioned
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        Path(output).write_text(text, encoding="utf-8")
    if picture is not None:
        drawn = captioned[:MOST_DRAWN]
        sheet = draw_captions([p.pixels for p, _ in drawn], [c for _, c in drawn], [p.captions for p, _ in drawn])
        sheet.save(picture)
    return [caption for _, caption in captioned]


def caption_pictures(
    pretrained: Pretrained, pictures: Iterator[Picture], batch: int, **options
) -> Iterator[tuple[Picture, str]]:
    """Each picture with its caption; `options` are those of `generate_captions`."""
    device = model_device(pretrained.model)
    with pretrained.model.packed_for_generation():
        for group, pixel_values in batched(pictures, batch):
            captions = generate_captions(pretrained.model, pretrained.tokenizer, pixel_values.to(device), **options)
            yield from zip(group, captions, strict=True)
