"""DeepSpeed's engine, set up without compiling anything and made to behave alike in every ZeRO stage."""

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmscale.config import Config, TrainConfig
from mmscale.errors import UserError
from mmscale.train.averaging import WeightAverage
from mmscale.train.direct import exchange_directly
from mmscale.train.gradients import norm_of, part_norms, watch_gradients
from mmscale.train.host_memory import keep_freed_memory
from mmscale.train.optimizer import build_optimizer
from mmscale.train.state import TrainState, bare_name

EXIT_BAD_INPUT = 2  # as for every command

# What the objective gives: (module, micro-batches, backward) -> detached values that are equal on every rank.
ForwardBackward = Callable[[nn.Module, list, Callable[[Tensor], None]], dict[str, Tensor]]


@dataclass(frozen=True)
class Processes:
    """This process among the others: a launcher's environment (RANK, WORLD_SIZE, ...) or, without one, alone."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup  # over the CPU, so that flags and counts never wait for the device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def host(self) -> str:
        return socket.gethostname()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when it is so on one of them."""
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def agree(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on every rank; a UserError on any of them ends all, so that nobody waits."""
        error, result = None, None
        try:
            result = work()
        except UserError as raised:
            error = str(raised)
        errors = [text for text in self.gather(error) if text is not None]
        if errors:
            self.refuse(errors[0])
        return result

    def refuse(self, message: str) -> NoReturn:
        """Called by all ranks: rank 0 raises the UserError, the others leave without saying the same once more."""
        if self.is_main:
            raise UserError(message)
        raise SystemExit(EXIT_BAD_INPUT)


def start_processes(*, deterministic: bool = False) -> Processes:
    """Joins the other ranks; a process group that is already there is used.

    `deterministic` asks PyTorch for kernels that give the same bits every time, and for an error where it has none.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    # DeepSpeed would otherwise probe for a compiler, and compile a shared-memory all-reduce for more than a minute.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names DeepSpeed uses
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore()}
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        timeout = timedelta(minutes=30)
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, **alone)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return Processes(rank, world_size, local_rank, device, dist.new_group(backend="gloo"))


def micro_batches_per_step(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """(micro-batch, accumulation): global_batch = ranks x micro-batch x accumulation.

    Raises UserError with the sizes that fit when the global batch does not divide.
    """
    total = train.global_batch
    if total % world_size:
        fits = [n for n in range(1, min(total, 1024) + 1) if total % n == 0]
        below, above = total // world_size * world_size, -(-total // world_size) * world_size
        batches = " or ".join(str(size) for size in sorted({below, above}) if size)
        raise UserError(
            f"train.global_batch: {total} does not divide by {world_size} ranks; "
            f"take {batches}, or a number of ranks among {_listing(fits)}"
        )
    share = total // world_size
    micro = train.micro_batch or share
    if share % micro:
        fits = [n for n in range(1, share + 1) if share % n == 0]
        raise UserError(
            f"train.micro_batch: {micro} does not divide the {share} samples of a rank "
            f"(global batch {total} over {world_size} ranks); {_listing(fits)} would"
        )
    return micro, share // micro


def out_of_memory_advice(train: TrainConfig, world_size: int) -> str:
    """What to do when a step does not fit: the largest micro-batch that divides and is at most half as large."""
    micro, _ = micro_batches_per_step(train, world_size)
    share = train.global_batch // world_size
    smaller = max((n for n in range(1, micro // 2 + 1) if share % n == 0), default=None)
    if smaller is None:
        return (
            "train.micro_batch: not even a micro-batch of 1 fits into memory; set model.checkpoint: full, a higher "
            "train.zero_stage, or train.offload"
        )
    return (
        f"train.micro_batch: {micro} does not fit into memory; set it to {smaller} (the global batch and its gradient "
        f"stay the same), or save memory with model.checkpoint: full or a higher train.zero_stage"
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _listing(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in (numbers if len(numbers) <= 12 else [*numbers[:6], "...", *numbers[-5:]]))


def deepspeed_config(config: Config, world_size: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration: what mmscale derives, with the user's `deepspeed` section laid over its defaults.

    Raises UserError for a key in that section that is derived from another one, and for fp16 on a CPU.
    """
    train = config.train
    micro, accumulation = micro_batches_per_step(train, world_size)
    derived: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if clips_itself(train) else clip_norm(config),
        "zero_optimization": {"stage": train.zero_stage, **_offload(train)},
        **_precision(train, device),
    }
    defaults = {
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW steps offloaded state: DeepSpeed's has to be compiled
        "zero_optimization": {"overlap_comm": False},
    }
    if config.optim.name == "muon":
        if train.precision == "fp16" or train.offload != "none":
            raise UserError("optim.name: muon works with neither fp16 nor train.offload; take adamw")
        defaults["zero_optimization"]["reduce_scatter"] = train.zero_stage != 3  # Muon needs whole gradients there
    _refuse_clashes(config.deepspeed, derived)
    return _merge(_merge(defaults, config.deepspeed), derived)


def clip_norm(config: Config) -> float:
    """The largest gradient norm. None with Muon: DeepSpeed would clip the update after it has been orthogonalised."""
    return config.train.grad_clip if config.optim.name == "adamw" else 0.0


def clips_itself(train: TrainConfig) -> bool:
    """True where DeepSpeed would neither report the gradient norm nor notice that it is not finite."""
    return train.zero_stage == 0 and train.precision in ("fp32", "bf16")


def _precision(train: TrainConfig, device: torch.device) -> dict[str, Any]:
    if train.grad_dtype is not None and train.precision != "bf16_params":
        raise UserError(f"train.grad_dtype: only bf16_params leaves a choice; gradients are fp32 in {train.precision}")
    if train.grad_dtype == "fp32" and train.zero_stage < 2:
        raise UserError("train.grad_dtype: fp32 sums of bf16_params need train.zero_stage: 2 or 3")
    if train.precision == "fp32":
        return {}
    if train.precision == "bf16":
        # No module is named, so that gradients are still summed over ranks in fp32.
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
    if train.precision == "bf16_params":
        return {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": train.grad_dtype or "bf16"},
        }
    if device.type == "cpu":
        raise UserError("train.precision: fp16 does not run on a CPU; take fp32 or bf16")
    if train.zero_stage == 0:
        raise UserError(
            "train.precision: DeepSpeed does not scale the loss of fp16 in stage 0; set train.zero_stage: 1"
        )
    return {"fp16": {"enabled": True}}


def _offload(train: TrainConfig) -> dict[str, Any]:
    if train.offload == "none":
        return {}
    if train.zero_stage == 0:
        raise UserError("train.offload: nothing can be offloaded in stage 0; set train.zero_stage to 1, 2 or 3")
    if train.offload == "all" and train.zero_stage != 3:
        raise UserError("train.offload: `all` needs train.zero_stage: 3; in other stages only the optimizer can leave")
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {"offload_optimizer": place} | ({"offload_param": place} if train.offload == "all" else {})


_OWNERS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.grad_clip",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer": "train.offload",
    "zero_optimization.offload_param": "train.offload",
    "data_types": "train.precision and train.grad_dtype",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "the `optim` section",
    "scheduler": "the `optim` section",
}


def _refuse_clashes(section: dict[str, Any], derived: dict[str, Any]) -> None:
    for path, owner in _OWNERS.items():
        node: Any = section
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        if node is not None:
            raise UserError(f"deepspeed.{path}: this follows from {owner}; set it there")


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


@dataclass
class Update:
    """What one optimizer step did; `applied` is False when the update was left out, on all ranks alike.

    `values` is what the objective gave, `lr` the rate that was asked for. `grad_norm` is the global norm before
    clipping, None when it was not finite; `part_norms` are those of the model's parts, where they were asked for.
    """

    values: dict[str, Tensor]
    lr: float = 0.0
    applied: bool = True
    grad_norm: Tensor | float | None = None
    part_norms: dict[str, Tensor] = field(default_factory=dict)


class Engine:
    """One objective under DeepSpeed: `step` is one update from the micro-batches of one global batch.

    `allows`, where it is set, may deny an update that is about to be made: it is given the values of the objective and
    the gradient norm, on all ranks alike.
    """

    def __init__(self, objective: nn.Module, forward_backward: ForwardBackward, config: Config, processes: Processes):
        self.config = config
        self.processes = processes
        self._forward_backward = forward_backward
        settings = deepspeed_config(config, processes.world_size, processes.device)
        if config.optim.name == "muon" and processes.device.type == "cpu":
            torch.compiler.set_stance("force_eager")  # its kernels are compiled, which on a CPU takes a C++ compiler
        optimizer = build_optimizer(objective, config.optim)
        self.deepspeed, _, _, _ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
        exchange_directly(self.deepspeed.optimizer)
        if config.train.zero_stage == 0 and processes.world_size == 1:
            self.deepspeed.enable_backward_allreduce = False  # it would copy all gradients to and fro
        self.objective = objective
        self.state = TrainState(self.deepspeed)
        self.average = WeightAverage(self.state, config.train.ema_decay) if config.train.ema_decay else None
        self.allows: Callable[[dict[str, Tensor], Tensor], bool] | None = None
        self._part_of = {
            parameter: bare_name(name).partition(".")[0]
            for name, parameter in objective.named_parameters()
            if parameter.requires_grad
        }
        self._update = Update({})
        self._wants_part_norms = False
        watch_gradients(self.deepspeed.optimizer, self._may_update)

    def step(self, micro_batches: list, lr: float, *, samples: int = 0, part_norms: bool = False) -> Update:
        """Forward and backward of every micro-batch, then one update with the learning rate `lr`, on all ranks.

        `samples` have been consumed before: a group that begins to learn later is left as it is.
        The update is left out when the gradient is not finite, or when `allows` denies it.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"] if samples >= group["starts_at"] else 0.0
        left = len(micro_batches)

        def backward(loss: Tensor) -> None:
            nonlocal left
            left -= 1
            self.deepspeed.set_gradient_accumulation_boundary(left == 0)
            # A tensor of its own: DeepSpeed's hook on the loss that left the module would, in stage 0, come before the
            # one that tells it not to divide by the accumulation.
            self.deepspeed.backward(loss.clone(), scale_wrt_gas=False)

        try:
            values = self._forward_backward(self.deepspeed, micro_batches, backward)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(out_of_memory_advice(self.config.train, self.processes.world_size)) from error
        assert left == 0, "one backward for every micro-batch"
        self._update = update = Update(values, lr)
        self._wants_part_norms = part_norms
        if clips_itself(self.config.train):
            self._step_stage_0(update)
        else:
            self.deepspeed.step()
            update.applied = not getattr(self.deepspeed.optimizer, "overflow", False)
            if update.applied:
                update.grad_norm = self.deepspeed.get_global_grad_norm()
        return update

    def _step_stage_0(self, update: Update) -> None:
        for parameter in self._part_of:
            if parameter.grad is None:  # with several ranks DeepSpeed does this
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._part_of]
        norm = norm_of(gradients)
        update.applied = bool(torch.isfinite(norm)) and self._may_update(norm)
        if not update.applied:
            self.deepspeed.zero_grad()
            return
        update.grad_norm = norm
        limit = clip_norm(self.config)
        if limit and (excess := float((norm + 1e-6) / limit)) > 1.0:
            torch._foreach_div_(gradients, excess)
        self.deepspeed.step()

    def _may_update(self, norm: Tensor) -> bool:
        if self._wants_part_norms:
            self._update.part_norms = part_norms(self.deepspeed.optimizer, self._part_of)
        return self.allows is None or self.allows(self._update.values, norm)
