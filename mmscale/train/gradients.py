"""Gradients between their reduction and the update: their norms, whole and per part, and a veto on the update.

Like `state.py` and `direct.py` this touches DeepSpeed's private names; nothing else does.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

# Given the global norm before clipping, may the update be made? Asked on all ranks alike.
Decide = Callable[[Tensor], bool]


def watch_gradients(zero: Any, see: Decide) -> None:
    """Has `see` called with the global norm before each update of stages 1 to 3; an update that it denies is skipped.

    DeepSpeed skips an update whose norm is not finite, on all ranks and in every precision, and cleans up after itself.
    A denied update is given such a norm.
    """
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        plain_groups = zero._get_norm_groups

        def norm_groups() -> list[Tensor]:
            norms = plain_groups()
            total = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
            invalid = any(float(norm) < 0 for norm in norms)  # DeepSpeed's mark of a norm that is not finite
            return norms if invalid or see(total / zero.loss_scale) else [torch.full_like(norms[0], torch.inf)]

        zero._get_norm_groups = norm_groups
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        plain_norm = zero.scaled_global_norm

        def norm(*args: Any, **kwargs: Any) -> Tensor:
            total = plain_norm(*args, **kwargs)
            invalid = not torch.isfinite(total)
            return total if invalid or see(total / zero.loss_scale) else torch.full_like(total, torch.inf)

        zero.scaled_global_norm = norm


def part_norms(zero: Any, part_of: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """part -> the norm of its averaged gradients, equal on every rank. Valid where `watch_gradients` calls.

    Empty where DeepSpeed keeps the gradients elsewhere (offload).
    """
    parts = sorted(set(part_of.values()))
    device = next(iter(part_of)).device
    gradients: dict[str, list[Tensor]] = {part: [] for part in parts}
    for parameter, gradient in _averaged_gradients(zero):
        gradients[part_of[parameter]].append(gradient.detach())
    squares = torch.zeros(len(parts), dtype=torch.float64, device=device)
    for position, own in enumerate(gradients.values()):
        if own:  # another rank may hold the whole part
            squares[position] = norm_of(own).square()
    sharded = False
    if isinstance(zero, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        sharded = True
        squares /= float(zero.loss_scale) ** 2
    if sharded and dist.get_world_size() > 1:
        dist.all_reduce(squares)
    return dict(zip(parts, squares.sqrt(), strict=True)) if squares.any() else {}


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The norm [] of all of them together, in fp64.

    Added up from norms in fp32, since fp64 copies of everything cost more than the norm: a CPU sums one element after
    the other, which is accurate enough for short pieces.
    """
    pieces = [
        piece
        for gradient in gradients
        for piece in (gradient.flatten().split(2**16) if gradient.device.type == "cpu" else (gradient,))
    ]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(pieces, 2, torch.float32)).double())


def _averaged_gradients(zero: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """This rank's share of the gradients: pieces in stages 1 to 3, all of them in stage 0."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        for index, parameters in enumerate(zero.fp16_groups):
            yield from zip(parameters, zero.averaged_gradients.get(index, []), strict=False)
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        for index, parameters in enumerate(zero.params_in_partition):
            yield from zip(parameters, zero.averaged_gradients.get(index) or [], strict=False)
    else:
        for group in zero.param_groups:
            yield from ((p, p.grad) for p in group["params"] if p.grad is not None)
