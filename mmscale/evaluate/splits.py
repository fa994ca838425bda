"""A finite split, read as a model needs it."""

from mmscale.config import DataConfig, Paths
from mmscale.data.loader import EvalSet
from mmscale.data.tokenizer import Tokenizer
from mmscale.evaluate.ranks import rank_and_world_size
from mmscale.model.modeling_mmscale import MMScaleModel

WHOLE = (0, 1)  # all of a split, whoever else reads it


def open_split(
    shards: Paths,
    model: MMScaleModel,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    batch_size: int,
    limit: int | None = None,
    ranks: tuple[int, int] | None = None,
) -> EvalSet:
    """The split in the model's picture size and context length.

    Args:
        limit: only the first so many samples.
        ranks: (rank, world size) whose part it is; this process's when None.
    """
    rank, world_size = ranks or rank_and_world_size()
    return EvalSet(
        shards,
        tokenizer,
        data=data,
        image_size=model.config.vision_config.image_size,
        context_length=model.config.text_config.context_length,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        limit=limit,
    )
