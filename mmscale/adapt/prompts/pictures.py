"""Pictures of a split through the image tower, once for all prompts that are tried on them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.prompts.classes import Classes
from mmscale.adapt.tuning import open_split
from mmscale.data.loader import EvalSet
from mmscale.errors import UserError
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.ranks import gather_in_order
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.pretrained import Pretrained


@dataclass
class Pictures:
    """A split's pictures that have a class, through the image tower; on the CPU, the same on every rank.

    image_embeds: [pictures, embed_dim], of unit length. image_tokens: [pictures, tokens, embed_dim], where asked for.
    targets: [pictures], -1 where there is no class.
    """

    image_embeds: Tensor
    image_tokens: Tensor | None
    targets: Tensor


@torch.no_grad()
def encode_split(model: MMScaleModel, split: EvalSet, classes: Classes, tokens: bool, where: str) -> Pictures:
    """Collective. Raises UserError, opening with `where`, when no picture has a class."""
    device = model_device(model)
    positions: list[int] = []
    columns: list[list[Tensor]] = [[], [], []]
    for batch in split:
        image_embeds, image_tokens = model.encode_image(batch.pixel_values.to(device))
        targets = classes.targets(batch.records).to(device)
        rows = ((targets >= 0) & batch.valid.to(device)).nonzero().flatten()
        positions += batch.positions[rows.cpu()].tolist()
        kept = image_tokens if tokens else image_tokens[:, :0]
        for column, values in zip(columns, (image_embeds, kept, targets), strict=True):
            column.append(values[rows])
    _, (embeds, kept, targets) = gather_in_order(positions, *(torch.cat(column) for column in columns))
    if not len(targets):
        raise UserError(f"{where}: no picture has one of the classes {', '.join(classes.names)} in its JSON")
    return Pictures(embeds.float().cpu(), kept.float().cpu() if tokens else None, targets.cpu())


@torch.no_grad()
def encode_pixels(model: MMScaleModel, pixel_values: Tensor, tokens: bool) -> Pictures:
    """Pictures without a class."""
    image_embeds, image_tokens = model.encode_image(pixel_values.to(model_device(model)))
    no_class = torch.full((len(pixel_values),), -1)
    return Pictures(image_embeds.float().cpu(), image_tokens.float().cpu() if tokens else None, no_class)


def encode_splits(config: AdaptConfig, model: Pretrained, classes: Classes, tokens: bool) -> dict[str, Pictures]:
    """`dev` (data.val) and, where there is one, `test` (data.test). Collective."""
    shards = {"dev": ("data.val", config.data.val), "test": ("data.test", config.data.test)}
    return {
        name: encode_split(model.model, open_split(config, model.model, model.tokenizer, paths), classes, tokens, where)
        for name, (where, paths) in shards.items()
        if paths is not None
    }


def encode_content_free(config: AdaptConfig, model: Pretrained, tokens: bool) -> Pictures:
    """Pictures that say nothing about a class: black, grey, white, noise, and the mean of data.val's."""
    size = model.image_size
    total, count = torch.zeros(3, size, size), 0
    for batch in open_split(config, model.model, model.tokenizer, config.data.val):
        own = batch.pixel_values[batch.valid]
        total += own.float().sum(0)
        count += len(own)
    flat = [torch.full((3, size, size), value, dtype=torch.uint8) for value in (0, 128, 255)]
    draw = torch.Generator().manual_seed(config.run.seed)
    noise = torch.randint(0, 256, (3, size, size), generator=draw, dtype=torch.uint8)
    mean = (total / max(count, 1)).round().to(torch.uint8)
    return encode_pixels(model.model, torch.stack([*flat, noise, mean]), tokens)
