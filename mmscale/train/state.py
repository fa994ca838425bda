"""DeepSpeed's partitions <-> the named tensors of a checkpoint. DeepSpeed's private names are in this file,
`gradients.py` and `direct.py`.

Every ZeRO stage steps some flat fp32 tensors; they differ in which elements of which parameter lie where:

- stage 0: each parameter (or, with 16-bit parameters, its fp32 copy) is its own flat tensor, whole on every rank;
- stages 1 and 2: the parameters of a group lie end to end, padded, and each rank steps one equal part of that line;
- stage 3: each parameter is cut into equal parts, and a rank's parts lie end to end in sub-groups.

A `Slot` says this for one parameter and one rank. With slots, saving copies runs of elements out and loading copies
them in, in any stage and on any number of ranks. The weights, both Adam moments and the step counts all lie along the
same flat tensors, so one description serves them all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from mmscale.checkpoint import Checkpoint, Fragment
from mmscale.errors import UserError

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Slot:
    """Elements [start, stop) of a parameter, at `offset` of `flat`, which is fp32 and what the optimizer steps.

    `replicated`: every rank has the same slot (stage 0), so that each saves only its share. `momentum_offset`: where
    the whole parameter's momentum begins; stages 1 and 2 keep Muon's so, on every rank that steps a part of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    flat: Tensor
    offset: int
    replicated: bool = False
    momentum_offset: int | None = None

    def view(self, like_flat: Tensor) -> Tensor:
        """This slot's elements, [stop - start], of a tensor that lies along `flat`."""
        return like_flat.detach().view(-1).narrow(0, self.offset, self.stop - self.start)


class TrainState:
    """What has to survive a restart of one rank's engine: weights, optimizer state, buffers, frozen parameters.

    `engine` is DeepSpeed's, around a module whose `model` is the bare model; tensors have the names that this model
    gives them. Optimizer state is created here with zeros, so that a run can be saved before its first update.
    """

    def __init__(self, engine: Any):
        self._zero = engine.optimizer
        self._inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._rank, self._world_size = engine.global_rank, engine.world_size
        module = engine.module
        names = {parameter: bare_name(name) for name, parameter in module.named_parameters()}
        assert len(set(names.values())) == len(names), "two parameters share a name"
        self._frozen = {name: p for p, name in names.items() if not p.requires_grad}
        self._buffers = {bare_name(name): module.get_buffer(name) for name in persistent_buffers(module)}
        self.slots = list(_slots(self._zero, {p: name for p, name in names.items() if p.requires_grad}))
        self.companions: dict[str, dict[Tensor, Tensor]] = {}
        self._groups = dict(_flats_and_groups(self._zero))
        for flat, group in self._groups.items():
            _create_optimizer_state(self._inner.state[flat], flat, group, _momentum_size(self._zero, flat))

    @property
    def flats(self) -> list[Tensor]:
        """The flat fp32 tensors that this rank's optimizer steps."""
        return list(self._groups)

    def add_companion(self, kind: str, tensors: dict[Tensor, Tensor]) -> None:
        """More tensors that lie along the flats (averaged weights), saved and restored with them under `kind`."""
        assert set(tensors) == set(self._groups)
        self.companions[kind] = tensors

    # --- saving ---------------------------------------------------------------------------------------------------

    def fragments(self) -> list[Fragment]:
        """Host copies of what this rank has to write; over all ranks, every element exactly once."""
        fragments = []
        for slot in self.slots:
            low, high = self._share(slot.start, slot.stop) if slot.replicated else (slot.start, slot.stop)
            if low >= high:
                continue
            for kind, start, data in self._runs(slot):
                if slot.replicated:
                    data = data[low - start : high - start]
                if slot.replicated or start == slot.start:  # else another rank, too, has it from its beginning
                    begin = low if slot.replicated else start
                    end = begin + data.numel()
                    fragments.append(Fragment(kind, slot.name, slot.shape, begin, end, _host_copy(data)))
            if low == 0 and "step" in (state := self._inner.state[slot.flat]):
                step = torch.tensor([int(state["step"])], dtype=torch.int64)
                fragments.append(Fragment("step", slot.name, (), 0, 1, step))
        for name, parameter in self._frozen.items():
            start, data, shape = _local_part(parameter)
            low, high = (start, start + data.numel())
            if not is_partitioned(parameter):
                low, high = self._share(0, data.numel())
                data = data[low:high]
            if low < high:
                fragments.append(Fragment("param", name, shape, low, high, _host_copy(data)))
        if self._rank == 0:
            for name, buffer in self._buffers.items():
                data = _host_copy(buffer.reshape(-1))
                fragments.append(Fragment("buffer", name, tuple(buffer.shape), 0, data.numel(), data))
        return fragments

    def group_settings(self) -> list[dict[str, Any]]:
        """The parameter groups' settings (weight decay, learning-rate factor, ...), for the manifest."""
        return [
            {key: value for key, value in group.items() if isinstance(value, int | float | str | tuple)}
            for group in self._inner.param_groups
        ]

    def loss_scale(self) -> dict[str, float]:
        """Where the dynamic loss scale of fp16 stands; in other precisions it stays at 1."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}

    def _runs(self, slot: Slot) -> Iterator[tuple[str, int, Tensor]]:
        """(kind, start, this rank's flat elements from there on) for all that is kept for every element."""
        yield "param", slot.start, slot.view(slot.flat)
        state = self._inner.state[slot.flat]
        for kind in _state_kinds(self._groups[slot.flat]):
            if slot.momentum_offset is None:
                yield kind, slot.start, slot.view(state[kind])
            else:
                yield kind, 0, state[kind].narrow(0, slot.momentum_offset, math.prod(slot.shape))
        for kind, tensors in self.companions.items():
            yield kind, slot.start, slot.view(tensors[slot.flat])

    def _share(self, start: int, stop: int) -> tuple[int, int]:
        size = stop - start
        return (
            start + size * self._rank // self._world_size,
            start + size * (self._rank + 1) // self._world_size,
        )

    # --- loading --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over a checkpoint that any stage wrote on any number of ranks; reads only this rank's elements.

        All ranks must call this. A parameter without moments there (it was frozen) starts with zeros, as at the start
        of a run. Raises UserError when the tensors are not the model's.
        """
        self._check_names(checkpoint)
        _before_writing(self._zero)
        for slot in self.slots:
            for kind, start, data in self._runs(slot):
                if checkpoint.has(slot.name, kind):
                    data.copy_(checkpoint.read(slot.name, kind, start, start + data.numel()))
                elif kind in self.companions:
                    data.copy_(slot.view(slot.flat))
            state = self._inner.state[slot.flat]
            if "step" in state and checkpoint.has(slot.name, "step"):
                # Parameters that were frozen for a while share a flat tensor, and so a count, with those that were not.
                state["step"].clamp_(min=int(checkpoint.read(slot.name, "step")))
        for name, parameter in self._frozen.items():
            start, data, _ = _local_part(parameter)
            data.copy_(checkpoint.read(name, "param", start, start + data.numel()))
        for name, buffer in self._buffers.items():
            buffer.copy_(checkpoint.read(name, "buffer"))
        _after_writing(self._zero)
        scaler = getattr(self._zero, "loss_scaler", None)
        for name, value in checkpoint.manifest.get("loss_scale", {}).items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)

    def _check_names(self, checkpoint: Checkpoint) -> None:
        ours = {slot.name: slot.shape for slot in self.slots}
        ours |= {name: _local_part(parameter)[2] for name, parameter in self._frozen.items()}
        for name, shape in ours.items():
            if checkpoint.shape(name) != shape:
                theirs = list(checkpoint.shape(name))
                raise UserError(
                    f"{checkpoint.path}: `{name}` has the shape {theirs} there, {list(shape)} in this model"
                )


def bare_name(name: str) -> str:
    """A parameter's name in the model, without the wrapper that holds the model as `model`."""
    return name.removeprefix("model.")


def persistent_buffers(module: nn.Module) -> list[str]:
    """Names of the buffers that belong to the module's state; tables derived from its configuration do not."""
    names = []
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if buffer is not None and name not in child._non_persistent_buffers_set:
                names.append(f"{prefix}.{name}" if prefix else name)
    return names


# --- what differs between the stages --------------------------------------------------------------------------------


def is_partitioned(parameter: nn.Parameter) -> bool:
    """True under stage 3, where a parameter's own data is only there while it is used."""
    return hasattr(parameter, "ds_tensor")


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def _slots(zero: Any, names: dict[nn.Parameter, str]) -> Iterator[Slot]:
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        for parameter, name in names.items():
            group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
            start = min(part * zero._get_param_partition_rank(parameter), parameter.ds_numel)
            stop = min(start + part, parameter.ds_numel)
            if start < stop:
                flat = zero.fp32_partitioned_groups_flat[group]
                yield Slot(name, parameter_shape(parameter), start, stop, flat, offset)
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        for parameter, name in names.items():
            link = parameter._hp_mapping
            if link is not None:
                group = link.param_group_index
                flat = zero.single_partition_of_fp32_groups[group]
                inside, start = link.hp_fragment_address, link.lp_fragment_address.start
                momentum = None
                if zero.optimizer.param_groups[group].get("use_muon"):
                    before = takewhile(lambda other, p=parameter: other is not p, zero.params_in_partition[group])
                    momentum = sum(other.numel() for other in before)
                stop = start + inside.numel
                yield Slot(name, tuple(parameter.shape), start, stop, flat, inside.start, momentum_offset=momentum)
    else:
        masters = _stage0_masters(zero)
        for parameter, name in names.items():
            flat = masters[parameter]
            yield Slot(name, tuple(parameter.shape), 0, parameter.numel(), flat, 0, replicated=True)


def _stage0_masters(zero: Any) -> dict[nn.Parameter, Tensor]:
    """parameter -> the fp32 tensor that is stepped in its place; itself unless parameters are 16 bits wide."""
    if isinstance(zero, FP16_UnfusedOptimizer):
        pairs = zip(zero.fp16_groups, zero.fp32_groups, strict=True)
        return {p: master for low, high in pairs for p, master in zip(low, high, strict=True)}
    return {p: p for group in zero.param_groups for p in group["params"]}


def _flats_and_groups(zero: Any) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Every flat tensor of this rank with the parameter group whose settings it is stepped with."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            yield flat, zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        yield from zip(zero.single_partition_of_fp32_groups, zero.optimizer.param_groups, strict=True)
    else:
        for group in zero.param_groups:
            for parameter in group["params"]:
                yield parameter, group


def _state_kinds(group: dict[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if group.get("use_muon") else ("exp_avg", "exp_avg_sq")


def _momentum_size(zero: Any, flat: Tensor) -> int | None:
    """Elements of Muon's momentum where it does not lie along the flat tensor (see `Slot`)."""
    if isinstance(zero, DeepSpeedZeroOptimizer):
        for index, candidate in enumerate(zero.single_partition_of_fp32_groups):
            if candidate is flat:
                return sum(parameter.numel() for parameter in zero.params_in_partition[index])
    return None


def _create_optimizer_state(
    state: dict[str, Any], flat: Tensor, group: dict[str, Any], momentum_size: int | None
) -> None:
    """State as before the first update; some stages have by now made a dummy one and counted it."""
    if group.get("use_muon"):
        own = momentum_size is not None
        state["momentum_buffer"] = flat.new_zeros(momentum_size) if own else torch.zeros_like(flat, requires_grad=False)
    else:
        for kind in _state_kinds(group):
            state[kind] = torch.zeros_like(flat, requires_grad=False)
        device = flat.device if group.get("fused") or group.get("capturable") else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)


def _local_part(parameter: nn.Parameter) -> tuple[int, Tensor, tuple[int, ...]]:
    """(start, the flat elements from there on that this rank holds, shape) of a parameter that is not trained."""
    shape = parameter_shape(parameter)
    if not is_partitioned(parameter):
        return 0, parameter.detach().view(-1), shape
    part = parameter.ds_tensor.detach().view(-1)
    start = min(part.numel() * torch.distributed.get_rank(parameter.ds_process_group), parameter.ds_numel)
    return start, part[: parameter.ds_numel - start], shape


def _before_writing(zero: Any) -> None:
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero._partition_all_parameters()  # so that no gathered copy outlives what it was gathered from


def _after_writing(zero: Any) -> None:
    """Brings the parameters that the module computes with up to date with the flat tensors."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        for index in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        zero.update_lp_params()
        # The links to the moments are made once, after the first update of group 0, and would miss the other groups.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    else:
        for parameter, master in _stage0_masters(zero).items():
            if parameter is not master:
                parameter.data.copy_(master)


def _host_copy(data: Tensor) -> Tensor:
    """A copy on the host; what is fp32 in other runs is saved as fp32 by all."""
    return data.detach().to(
        "cpu", torch.promote_types(data.dtype, torch.float32) if data.is_floating_point() else None, copy=True
    )
