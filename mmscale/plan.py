"""What a run will need and cost, before anything is rented: memory, step time, what binds, days and price.

All of it is arithmetic on the configuration; nothing is allocated. `benchmarks/plan.py` compares it with measured runs.

Memory per GPU [bytes], for P parameters on N ranks (https://arxiv.org/abs/1910.02054, sections 3 and 5):

    weights      w P     w = 4 with fp32 parameters, 2 with `bf16_params` and fp16        stage 3: / N
    gradients    g P     g = w, or 4 with `train.grad_dtype: fp32`                         stages 2, 3: / N
    optimizer    8 P     Adam's two moments, and 4 P of DeepSpeed's own fp32 copy,         stages 1, 2, 3: / N
                         which only stage 0 with fp32 parameters does without
    buffers      what DeepSpeed collects gradients in: all of `reduce_bucket_size` (default 5e8 elements) is allocated
                 in stages 1 to 3, twice with `overlap_comm`; stage 0, and a CPU, hold no more than the gradients, and
                 stage 0 on one rank none;
                 and the weights that stage 3 has gathered, `stage3_max_live_parameters` (default 1e9)
    step         PyTorch's AdamW keeps square roots of the second moments while it updates: 4 P   stages 1-3: / N
    activations  what the backward pass needs of a sample, times the micro-batch: see `saved_bytes`
    logits       the vocabulary head's chunk (64 MiB of fp32 logits and their gradient) and its weight's gradient

They are not there all at once. Weights and optimizer are; of the rest, the largest of three moments counts:

    backward begins   activations, logits, the buffers of stages 1 to 3; the gradients only with accumulation
    backward ends     gradients, buffers
    update            gradients, step; the buffers in stage 3, which never gives them back

On a CPU malloc keeps what is freed (`train/host_memory.py`), and what comes next does not fill the gaps: all of these
add up, with the flat copy of the gradients that stages 1 to 3 update with.

Time per step [s]: matrix products at `hardware.EFFICIENCY` of the peak, and the way of each weight to them
(`Gpu.weight_s`); element-wise work at the memory's bandwidth, since it moves each saved activation about MOVES times;
gradients and update move GRADIENT_BYTES, UPDATE_BYTES and SHARDED_BYTES a parameter, and AdamW its own; then
communication, which DeepSpeed does not overlap unless told so:

    stages 0-2   2 g P (N - 1) / N  a step            ring all-reduce, or reduce-scatter and all-gather
    stage 3      2 w P (N - 1) / N  a micro-batch for the weights, and g P (N - 1) / N for the gradients
    embeddings   4 E (global batch)  bytes gathered, and as many in the backward pass

The host meanwhile issues the operations, `Gpu.operations` for each parameter tensor. A GPU works beside its host, so
that the slower of the two counts; on a CPU they are one, and add up. The slower of this and of the loader, which has
CORES_PER_GPU cores, is the step.
"""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from mmscale.config import Config
from mmscale.errors import UserError
from mmscale.hardware import GIB, GPUS, Gpu, bandwidth
from mmscale.model.configuration_mmscale import MMScaleConfig
from mmscale.model.flops import decoder_flops, forward_flops, training_flops
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.presets import build_model_config

# Bytes moved for a parameter. Gradient, where it is collected: into the bucket, divided by the ranks, out again, each
# read and written. Update of a rank's share, besides AdamW: norm and clipping. Stages 1 to 3 moreover copy gradients
# into a flat tensor, new weights out of one, and for the norm each gradient to fp64.
GRADIENT_BYTES = 24
UPDATE_BYTES = 4 + 8
SHARDED_BYTES = 8 + 8 + 16
MOVES = 6.0  # a saved activation is written, read, and its gradient too, with some in between
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and fragmentation
CORES_PER_GPU = 12
LATENCY_S = 20e-6  # of one collective, for each doubling of the ranks
# CPU seconds that a sample costs: JPEG of 47 KB, decode and resize, on one core (benchmarks/loader.py).
LOADER_CPU_S = {"exact": 1.5e-3, "fast": 0.7e-3}
SAMPLE_BYTES = 50_000
DEFAULT_VOCABULARY = 49_408
DEFAULT_TEXT_TOKENS = 24  # captions from the web are short; at most the context length


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by kind; `total` is the most that is there at a time, see the module's docstring."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    logits: float
    step: float
    total: float


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by what they go into; `seconds` is the whole."""

    products: float
    element_wise: float
    optimizer: float
    network: float
    host: float
    loader: float
    overlaps: bool
    is_host: bool

    @property
    def device(self) -> float:
        compute = self.products + self.element_wise
        device = (max(compute, self.network) if self.overlaps else compute + self.network) + self.optimizer
        return device + self.host if self.is_host else max(device, self.host)

    @property
    def seconds(self) -> float:
        return max(self.device, self.loader)

    @property
    def binds(self) -> str:
        if self.loader > self.device:
            return "loader"
        if self.is_host or self.host < self.device:
            parts = {"compute": self.products, "memory bandwidth": self.element_wise + self.optimizer}
            parts["network"] = self.network
            return max(parts, key=parts.get)
        return "kernel launches"


@dataclass(frozen=True)
class Setup:
    """What is asked: a model, how it is trained, and on what."""

    config: Config
    model: MMScaleConfig
    text_tokens: int
    gpu: Gpu
    gpu_name: str
    gpus: int
    network: float  # bytes per second and GPU, between machines
    price: float | None  # per GPU and hour

    @property
    def parameters(self) -> dict[str, int]:
        return count_parameters(self.model)

    @property
    def stage(self) -> int:
        return self.config.train.zero_stage


def count_parameters(model: MMScaleConfig) -> dict[str, int]:
    """Parameters by part, of a model that is described but not made."""
    parts: dict[str, int] = {}
    for name, size in _parameter_sizes(model.to_json_string(use_diff=False)).items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + size
    return parts


def count_tensors(model: MMScaleConfig) -> int:
    """Parameter tensors."""
    return len(_parameter_sizes(model.to_json_string(use_diff=False)))


@cache  # describing a large model takes a second, and its memory is asked for again and again
def _parameter_sizes(model: str) -> dict[str, int]:
    with torch.device("meta"):
        described = MMScaleModel(MMScaleConfig(**json.loads(model)))
    return {name: parameter.numel() for name, parameter in described.named_parameters()}


def saved_bytes(setup: Setup, checkpointing: str | None = None) -> float:
    """Activations that the backward pass of one sample needs.

    A block on n tokens of width d keeps its input and the sum after attention (the residual stream: fp32 unless the
    parameters are half precision), and in the computing precision both norms' outputs, queries, keys, values, the mixed
    values (4 d), and what goes into the feed-forward's activation (ratio d): n d (2 r + (6 + ratio) e) bytes. A block
    that is recomputed keeps its input alone. Attention is fused and keeps no n x n matrix.
    """
    train, model = setup.config.train, setup.model
    vision, text, decoder = model.vision_config, model.text_config, model.decoder_config
    element = 4 if train.precision == "fp32" else 2  # what matrix products take and give
    residual = 4 if train.precision in ("fp32", "bf16") else 2
    mode = checkpointing or setup.config.model.checkpoint
    every = {"none": 0, "full": 1}.get(mode) or (int(mode.rpartition("_")[2]) if "_" in mode else 0)

    def block(tokens: float, width: int, ratio: float, recomputed: bool = False) -> float:
        if recomputed:
            return tokens * width * residual
        return tokens * width * (2 * residual + (6 + ratio) * element)

    def stack(layers: int, tokens: float, width: int, ratio: float) -> float:
        return sum(block(tokens, width, ratio, bool(every) and i % every == every - 1) for i in range(layers))

    kept = max(1, round(vision.num_patches * (1 - vision.patch_dropout))) + int(vision.class_token)
    queries = vision.pooler_queries
    pixels = 3 * vision.patch_size**2 * kept * (4 + (4 if element == 2 else 0))
    # Of the recomputed blocks one at a time is whole again.
    total = block(kept, vision.width, vision.mlp_ratio) if every else 0.0
    total += pixels + kept * vision.width * 2 * residual  # patches, the sum with positions, and its norm
    total += stack(vision.layers, kept, vision.width, vision.mlp_ratio)
    total += kept * (vision.width * (residual + element) + 2 * model.embed_dim * element)  # pooler's context, k and v
    total += queries * model.embed_dim * (2 * element + 2 * residual)  # mixed, pooled, norm
    tokens = setup.text_tokens + 1
    total += stack(text.layers, tokens, text.width, text.mlp_ratio)
    if decoder.layers:
        tokens = setup.text_tokens - 1
        seen = queries + (kept if vision.patch_tokens else 0)
        total += stack(2 * decoder.layers, tokens, text.width, decoder.mlp_ratio)
        if not every:
            # A cross-attention keeps keys and values of the picture tokens, or, with few text tokens, its own mixing.
            cross = 2 * seen * text.width - 2 * tokens * text.width
            total += decoder.layers * max(0, cross) * element
        total += seen * model.embed_dim * (residual + element)
        total += tokens * text.width * (2 * residual + 2 * element)
    return total


def memory(setup: Setup, micro_batch: int, stage: int | None = None, checkpointing: str | None = None) -> Memory:
    """Bytes on one GPU; see the module's docstring."""
    train, gpu = setup.config.train, setup.gpu
    stage = setup.stage if stage is None else stage
    total, ranks = sum(setup.parameters.values()), setup.gpus
    half = train.precision in ("bf16_params", "fp16")
    weight = 2 if half else 4
    gradient = 4 if train.grad_dtype == "fp32" or not half else 2
    shard = {level: ranks if stage >= level else 1 for level in (1, 2, 3)}
    master = 0 if stage == 0 and not half else 4
    logits = 0.0
    if setup.model.decoder_config.layers:
        rows = min(micro_batch * (setup.text_tokens - 1), (1 << 24) / setup.model.vocab_size)
        logits = rows * setup.model.vocab_size * (4 + (2 if train.precision != "fp32" else 0))
        logits += 4.0 * setup.model.vocab_size * setup.model.text_config.width
    weights = weight * total / shard[3]
    gradients = gradient * total / shard[2]
    optimizer = (8 + master) * total / shard[1]
    buffers = _buffers(setup, stage, total, weight, gradient)
    activations = micro_batch * saved_bytes(setup, checkpointing)
    step = 4 * (gpu.step_copies if stage else gpu.step_copies_unsharded) * total / shard[1]
    accumulates = train.global_batch // ranks > micro_batch
    in_backward = gpu.slack * (activations + logits)
    if gpu.is_host:
        flat = gradient * total / shard[1] if stage else 0.0
        moments = (in_backward + gradients + buffers + flat + step,)
    else:
        moments = (
            in_backward + gradients * accumulates + buffers * (stage > 0),
            gradients + buffers,
            gradients + step + buffers * (stage == 3),
        )
    most = gpu.runtime + weights + optimizer + max(moments)
    return Memory(weights, gradients, optimizer, buffers, activations, logits, step, most)


def _buffers(setup: Setup, stage: int, total: int, weight: int, gradient: int) -> float:
    """Bytes of the buckets in which DeepSpeed collects gradients, and of the weights that stage 3 gathers."""
    options = setup.config.deepspeed.get("zero_optimization", {})
    bucket = options.get("reduce_bucket_size", 5e8)
    if stage == 0 and setup.gpus == 1:
        bucket = 0
    elif stage == 0 or setup.gpu.is_host:
        bucket = min(bucket, total)
    elif options.get("overlap_comm", False) and stage < 3:
        bucket *= 2
    live = options.get("stage3_max_live_parameters", 1e9) if stage == 3 else 0
    return gradient * bucket + weight * min(live, total)


def largest_micro_batch(setup: Setup, stage: int | None = None, checkpointing: str | None = None) -> int | None:
    """The largest micro-batch that divides a rank's share and fits; None when not even one sample does."""
    share = setup.config.train.global_batch // setup.gpus
    fits = (
        size
        for size in range(share, 0, -1)
        if share % size == 0 and memory(setup, size, stage, checkpointing).total <= USABLE * setup.gpu.memory
    )
    return next(fits, None)


def step_time(setup: Setup, micro_batch: int) -> Step:
    """Seconds of one step on every rank; see the module's docstring."""
    config, gpu, ranks = setup.config, setup.gpu, setup.gpus
    share = config.train.global_batch / ranks
    accumulation = share / micro_batch
    losses = {"contrastive": config.objective.contrastive_weight > 0, "caption": config.objective.caption_weight > 0}
    flops = training_flops(setup.model, setup.text_tokens, **losses)
    forward = forward_flops(setup.model, setup.text_tokens, **losses, training=True)
    if config.model.checkpoint != "none":
        every = 1 if config.model.checkpoint == "full" else int(config.model.checkpoint.rpartition("_")[2])
        flops += forward / every
    if accumulation > 1 and losses["contrastive"] and config.objective.negatives == "global":
        flops += forward - decoder_flops(setup.model, setup.text_tokens - 1) * losses["caption"]  # the embedding pass
    peak = gpu.flops if config.train.precision != "fp32" else gpu.flops / 2  # TF32
    total = sum(setup.parameters.values())
    half = config.train.precision in ("bf16_params", "fp16")
    updated = total / (ranks if setup.stage else 1)
    weights = (4 if config.train.precision == "fp32" else 2) * total * accumulation
    collected = GRADIENT_BYTES if setup.stage or ranks > 1 else 0
    own = UPDATE_BYTES + (SHARDED_BYTES if setup.stage else 0)
    return Step(
        products=share * flops / (gpu.efficiency * peak) + weights * (gpu.weight_s or 3 / gpu.hbm),
        element_wise=share * MOVES * saved_bytes(setup, "none") / (gpu.element_wise or gpu.hbm),
        optimizer=(collected * total * accumulation + (own + gpu.adamw_bytes) * updated) / gpu.hbm,
        network=_network_time(setup, total, 2 if half else 4, accumulation),
        host=gpu.operations * count_tensors(setup.model) * accumulation * gpu.operation_s,
        loader=share * LOADER_CPU_S[config.data.decode] / CORES_PER_GPU,
        overlaps=bool(config.deepspeed.get("zero_optimization", {}).get("overlap_comm", False)),
        is_host=gpu.is_host,
    )


def _network_time(setup: Setup, total: int, size: int, accumulation: float) -> float:
    ranks = setup.gpus
    if ranks == 1:
        return 0.0
    bandwidth = setup.gpu.neighbours if ranks <= setup.gpu.per_machine else min(setup.network, setup.gpu.neighbours)
    reduce_times = accumulation if setup.stage >= 2 else 1
    volume = size * total * (reduce_times + (2 * accumulation if setup.stage == 3 else 1))
    volume += 2 * 4 * setup.model.embed_dim * setup.config.train.global_batch
    collectives = 2 * math.ceil(total / 5e8) * accumulation + 8
    return volume * (ranks - 1) / ranks / bandwidth + collectives * LATENCY_S * math.ceil(math.log2(ranks))


@dataclass(frozen=True)
class Plan:
    """A setup worked out: with the micro-batch of the config, or the largest that fits."""

    setup: Setup
    micro_batch: int
    memory: Memory
    step: Step
    vocabulary_is_assumed: bool

    @property
    def fits(self) -> bool:
        return self.memory.total <= USABLE * self.setup.gpu.memory

    @property
    def samples_per_s(self) -> float:
        return self.setup.config.train.global_batch / self.step.seconds

    @property
    def mfu(self) -> float:
        flops = training_flops(self.setup.model, self.setup.text_tokens)
        return flops * self.samples_per_s / (self.setup.gpus * self.setup.gpu.flops)

    @property
    def days(self) -> float:
        return self.setup.config.train.samples / self.samples_per_s / 86_400

    @property
    def cost(self) -> float | None:
        price = self.setup.price
        return None if price is None else self.days * 24 * self.setup.gpus * price


def plan(
    config: Config,
    gpus: int = 8,
    gpu: str = "h100",
    net: str = "400Gb",
    price: float | None = None,
    text_tokens: int | None = None,
) -> Plan:
    """Works out a configuration on so many GPUs.

    Args:
        gpu: one of GPUS.
        net: bandwidth between machines, of each GPU, as in `400Gb` (bits) or `50GB` (bytes) per second.
        price: of a GPU hour; a usual one when None.
        text_tokens: mean length of a caption.

    Raises:
        UserError: an unknown GPU or bandwidth, a batch that does not divide, or a model that does not fit.
    """
    if gpu.lower() not in GPUS:
        near = difflib.get_close_matches(gpu.lower(), GPUS, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--gpu {gpu}: {hint}choose one of {', '.join(GPUS)}")
    if text_tokens is not None and text_tokens < 2:
        raise UserError(f"--text-tokens {text_tokens}: a caption has at least 2, its start and end marks")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price {price}: give what a GPU hour costs")
    vocabulary = _vocabulary(config)
    model = build_model_config(config.model, vocabulary or DEFAULT_VOCABULARY, contrastive=config.objective.contrastive)
    tokens = min(text_tokens or DEFAULT_TEXT_TOKENS, model.text_config.context_length)
    kind = GPUS[gpu.lower()]
    setup = Setup(
        config, model, tokens, kind, gpu.upper(), gpus, bandwidth(net), kind.price if price is None else price
    )
    return _work_out(setup, vocabulary is None)


def _work_out(setup: Setup, vocabulary_is_assumed: bool) -> Plan:
    train = setup.config.train
    if setup.gpus < 1:
        raise UserError(f"--gpus {setup.gpus}: give a number from 1 on")
    if train.global_batch % setup.gpus:
        near = [n for n in range(1, train.global_batch + 1) if train.global_batch % n == 0]
        below, above = max(n for n in near if n <= setup.gpus), min((n for n in near if n > setup.gpus), default=None)
        fits = f"{below} or {above}" if above else str(below)
        raise UserError(f"--gpus {setup.gpus}: does not divide train.global_batch, {train.global_batch}; {fits} would")
    micro = train.micro_batch if train.micro_batch else largest_micro_batch(setup)
    if micro is None:
        need = memory(setup, 1).total / GIB
        raise UserError(
            f"one sample needs {need:.0f} GiB on each of {setup.gpus} GPUs with {setup.gpu.memory / GIB:.0f} GiB: "
            f"take a higher train.zero_stage, model.checkpoint: full, or more GPUs"
        )
    micro = math.gcd(micro, train.global_batch // setup.gpus)
    return Plan(setup, micro, memory(setup, micro), step_time(setup, micro), vocabulary_is_assumed)


def _vocabulary(config: Config) -> int | None:
    if not (config.tokenizer.path and Path(config.tokenizer.path).exists()):
        return None
    from mmscale.data.tokenizer import Tokenizer

    return Tokenizer.load(config.tokenizer.path).vocab_size


def sweep(base: Plan, most: int = 4096) -> Iterator[Plan]:
    """The same run on 1, 2, 4, ... GPUs, as far as the global batch divides and the model fits."""
    for exponent in range(most.bit_length()):
        setup = replace(base.setup, gpus=2**exponent)
        try:
            yield _work_out(setup, base.vocabulary_is_assumed)
        except UserError:
            continue
