"""The few collective operations of the losses; with one process, or none initialised, they do nothing."""

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


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """log(sum of exp(x) over ranks), elementwise; minus infinity where every rank has it."""
    if world_size() == 1:
        return x
    largest = x.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    shift = largest.masked_fill(largest.isneginf(), 0.0)
    return sum_over_ranks((x - shift).exp()).log() + shift


def gather_rows(x: Tensor) -> Tensor:
    """[rows, ...] of every rank as [world size * rows, ...], in the order of the ranks. Not differentiable."""
    if world_size() == 1:
        return x
    gathered = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather(list(gathered.chunk(world_size())), x.contiguous())
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
