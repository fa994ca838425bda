"""The two large exchanges of ZeRO-1 and 2 over gloo: from where a tensor lies straight to where it belongs.

gloo gathers through a buffer of its own, and DeepSpeed reduces gradients to all ranks though each needs only its part's
sums. Here every pair of ranks exchanges just what the other one needs, in pieces that stay in the processor's cache.
Two ranks of one machine so spend a third of the CPU time on the same weights, and half of it on the gradients.

Like `state.py` and `gradients.py` this touches DeepSpeed's private names.
"""

from typing import Any

import deepspeed.comm.comm as deepspeed_comm
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

PIECE = 2**18  # elements: 1 MiB in fp32

# (rank of the group, begin, end): these elements of a flat tensor are that rank's.
Run = tuple[int, int, int]


def exchange_directly(zero: Any) -> None:
    """Has DeepSpeed's optimizer of stages 1 and 2 exchange fp32 gradients and weights this way, where they go by gloo.

    Gradients are left alone where they are not exchanged in fp32 or DeepSpeed accumulates them itself, and with Muon,
    of whose split matrices several ranks need the sums.
    """
    if not isinstance(zero, DeepSpeedZeroOptimizer) or zero.cpu_offload or torch.device(zero.device).type != "cpu":
        return
    deepspeed_comm.cdb.all_gather_function = all_gather
    groups = zero.optimizer.param_groups
    plain = zero.reduce_scatter and not any(zero._use_compact_grad_partition_buffer(i) for i in range(len(groups)))
    fp32 = zero.dtype == zero.communication_data_type == torch.float32
    if plain and fp32 and not any(group.get("use_muon") for group in groups):
        zero.average_tensor = lambda bucket, dtype: average(bucket, _runs(zero, dtype), zero.dp_process_group)


def all_gather(output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """`torch.distributed.all_gather_into_tensor`; on CPUs as a ring, in place where the input is part of the output."""
    if async_op or output_tensor.device.type != "cpu":
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    parts = output_tensor.view(-1).chunk(world_size)
    if parts[rank].data_ptr() != input_tensor.data_ptr():
        parts[rank].copy_(input_tensor.view(-1))
    for step in range(world_size - 1):
        right, left = (rank + 1) % world_size, (rank - 1) % world_size
        sent = dist.isend(parts[(rank - step) % world_size], group=group, group_dst=right)
        dist.irecv(parts[(rank - step - 1) % world_size], group=group, group_src=left).wait()
        sent.wait()
    return None


def average(tensor: Tensor, runs: list[Run], group: Any = None) -> None:
    """Averages a flat tensor over the ranks, in place; each rank then has the means of its own runs only.

    `runs` cover the tensor, the same on every rank. The order of summation is fixed, so that a step repeats bit by bit.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if world_size == 1:
        return
    pieces: list[list[Tensor]] = [[] for _ in range(world_size)]
    for owner, begin, end in runs:
        pieces[owner] += tensor[begin:end].split(PIECE)
    received = [tensor.new_empty(PIECE) for _ in range(2)]
    for shift in range(1, world_size):
        target, source = (rank + shift) % world_size, (rank - shift) % world_size
        sent = [dist.isend(piece, group=group, group_dst=target) for piece in pieces[target]]
        arriving = None  # one piece is on its way while the one before it is added
        for number, piece in enumerate(pieces[rank]):
            room = received[number % 2][: piece.numel()]
            before, arriving = arriving, (dist.irecv(room, group=group, group_src=source), room, piece)
            _add(before)
        _add(arriving)
        for work in sent:
            work.wait()
    for piece in pieces[rank]:
        piece.div_(world_size)


def _add(arriving: tuple[Any, Tensor, Tensor] | None) -> None:
    if arriving is not None:
        work, room, piece = arriving
        work.wait()
        piece.add_(room)


def _runs(zero: Any, dtype: torch.dtype) -> list[Run]:
    """Who steps what of the bucket that is about to be averaged."""
    runs: list[Run] = []
    at = 0
    for group, number, parameter in zero.ipg_buckets[dtype].params:
        offsets = zero.grad_start_offset[group]
        begins = sorted((offsets[owner][parameter], owner) for owner in zero.param_to_partition_ids[group][parameter])
        size = zero.bit16_groups[group][number].numel()
        for (begin, owner), end in zip(begins, [*(begin for begin, _ in begins[1:]), size], strict=True):
            if runs and runs[-1][0] == owner:
                runs[-1] = (owner, runs[-1][1], at + end)
            else:
                runs.append((owner, at + begin, at + end))
        at += size
    return runs
