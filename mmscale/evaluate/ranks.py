"""Bringing together what every rank has scored.

Everything here works without a process group too, as one rank. Every function is collective: all ranks call it, in the
same order.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_objects(value: Any) -> list[Any]:
    """One picklable value of every rank, in rank order, on every rank."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [value]
    values = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def gather_lists(values: list[Any]) -> list[Any]:
    """The ranks' lists, one after the other."""
    return [value for part in gather_objects(values) for value in part]


def gather_rows(rows: Tensor) -> Tensor:
    """The ranks' rows one below the other; their number may differ.

    Args:
        rows: `[rows, ...]`, on the device the process group's backend works on.

    Returns:
        `[rows of all ranks, ...]` in rank order, the same on every rank.
    """
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def gather_in_order(positions: list[int], *columns: Any) -> tuple[list[int], list[Any]]:
    """Columns of per-sample values of all ranks, in the order of the samples' positions in the split.

    Args:
        positions: of this rank's samples.
        columns: lists or tensors with one entry a sample.

    Returns:
        The sorted positions and, for each column, a list or a tensor in their order; equal on every rank.
    """
    everywhere = gather_lists(positions)
    order = sorted(range(len(everywhere)), key=everywhere.__getitem__)
    gathered = []
    for column in columns:
        if isinstance(column, Tensor):
            gathered.append(gather_rows(column)[torch.tensor(order, dtype=torch.long, device=column.device)])
        else:
            values = gather_lists(column)
            gathered.append([values[i] for i in order])
    return [everywhere[i] for i in order], gathered


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks, in place."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of one number of every rank."""
    if rank_and_world_size()[1] == 1:
        return value
    largest = torch.tensor([value], device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


@contextmanager
def launched_ranks(device: str | None = None) -> Iterator[torch.device]:
    """Joins the ranks of a launcher (`torchrun`, `deepspeed`), whose environment says so; alone without one.

    Args:
        device: where to compute; a GPU of this rank's own where there is one, unless given.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device(device or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()
