"""The few collective operations of the losses; with one process, or none initialised, they do nothing."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's `x`, on every rank."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def begin_sum_over_ranks(x: Tensor) -> Callable[[], Tensor]:
    """Starts `sum_over_ranks`; what it returns waits for the sum. Others may run meanwhile, on all ranks alike."""
    if world_size() == 1:
        return lambda: x
    total = x.clone()
    work = dist.all_reduce(total, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return total

    return wait


def logsumexp_over_ranks(x: Tensor, bound: Tensor) -> Tensor:
    """log(sum of exp(x) over ranks), elementwise; minus infinity where every rank has it.

    `bound` [] is equal on every rank, and x lies within 700 of it: then fp64 holds exp(x - bound), one sum does, and no
    maximum has to be found first.
    """
    if world_size() == 1:
        return x
    return (sum_over_ranks((x.double() - bound).exp()).log() + bound).to(x.dtype)


def gather_rows(*tensors: Tensor) -> list[Tensor]:
    """[rows, ...] of every rank as [world size * rows, ...], in the order of the ranks. Not differentiable."""
    if world_size() == 1:
        return list(tensors)
    gathered = [x.new_empty(world_size() * x.shape[0], *x.shape[1:]) for x in tensors]
    works = [
        dist.all_gather(list(whole.chunk(world_size())), own.contiguous(), async_op=True)
        for whole, own in zip(gathered, tensors, strict=True)
    ]
    for work in works:
        work.wait()
    return gathered


def reduce_scatter_rows(x: Tensor) -> Tensor:
    """The sum over ranks of [world size * rows, ...]; each rank keeps its own [rows, ...]."""
    if world_size() == 1:
        return x
    rows = x.shape[0] // world_size()
    if dist.get_backend() == "nccl":
        own = x.new_empty(rows, *x.shape[1:])
        dist.reduce_scatter(own, list(x.contiguous().chunk(world_size())))
        return own
    return sum_over_ranks(x)[rank() * rows :][:rows]  # not every gloo can scatter
