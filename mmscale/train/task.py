"""What the trainer needs to know about what it trains."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmscale.train.engine import ForwardBackward
from mmscale.train.selection import Selection


@dataclass
class Evaluated:
    """Scores by name, equal on every rank, and on rank 0 a few captioned pictures to look at (lines for a file).

    `was_cut`: time ran out, and the scores are of a part of the split.
    """

    scores: dict[str, float]
    examples: list[dict[str, Any]] = field(default_factory=list)
    was_cut: bool = False


@dataclass
class Task:
    """What is trained: pretraining builds one, and so does every kind of adaptation."""

    objective: nn.Module  # holds the model as `model`
    forward_backward: ForwardBackward
    stream: Any  # a TrainStream, or something with its methods
    tokenizer: Any
    flops_per_sample: Callable[[float], float] | None = None  # from a text length, of forward and backward
    evaluate: Callable[[], Evaluated] | None = None  # on all ranks
    selection: Selection | None = None  # the best evaluation's checkpoint is kept, and named by checkpoints/best
