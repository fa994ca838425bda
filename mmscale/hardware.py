"""What a plan has to know about machines: GPUs by their data sheets, this machine's CPU by measuring it."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mmscale.errors import UserError
from mmscale.model.linear import linear

GIB = 2**30
EFFICIENCY = 0.55  # of the peak, for large bf16 products as cuBLAS does them


@dataclass(frozen=True)
class Gpu:
    """One accelerator: dense bf16 FLOP/s, memory [bytes] and its bandwidth, and the bandwidth to its neighbours.

    operations: that a step takes for each parameter tensor. 8 kernels on a GPU: 5 of forward and backward, which
        PyTorch's profiler counts on `tiny` (157 tensors, 740), and 3 of DeepSpeed's buckets; the update is few.
    operation_s: seconds in which the host issues one: 4 to 6 us for a kernel
        (https://susun-blog.com/blog/pegainfer-3-cuda-graph).
    is_host: a CPU that trains: nothing runs beside it, and of what is allocated only the pages in use count.
    runtime, slack: calibration of `memory` on a CPU: bytes beside the tensors, and what the allocator holds for a byte
        of memory that comes and goes.
    element_wise: bytes per second of element-wise work; the memory's bandwidth when None.
    adamw_bytes: that PyTorch's AdamW moves for a parameter: `foreach` takes eight passes with 20 reads and writes.
    weight_s: seconds that a byte of a weight costs the products of a micro-batch besides their operations, which counts
        where few tokens meet a weight; three times over the memory's bus when None: it is read forward and backward,
        and its gradient is written.
    """

    flops: float
    memory: float
    hbm: float
    neighbours: float
    per_machine: int
    price: float | None  # per hour, as clouds asked for it in 2025; --price overrides
    efficiency: float = EFFICIENCY
    step_copies: float = 1.0  # of the second moments, which PyTorch's AdamW makes while it updates
    step_copies_unsharded: float = 1.0  # the same where the parameters are not one flat tensor
    operations: int = 8
    operation_s: float = 5e-6
    is_host: bool = False
    runtime: float = 0.0
    slack: float = 1.0
    element_wise: float | None = None
    adamw_bytes: int = 80
    weight_s: float | None = None


# From the makers' data sheets.
GPUS = {
    "a100": Gpu(312e12, 80 * GIB, 2.04e12, 300e9, 8, 1.8),
    "h100": Gpu(989e12, 80 * GIB, 3.35e12, 450e9, 8, 2.5),
    "h200": Gpu(989e12, 141e9, 4.8e12, 450e9, 8, 3.0),
    "b200": Gpu(2250e12, 180e9, 8.0e12, 900e9, 8, 5.0),
    "l40s": Gpu(362e12, 48 * GIB, 0.864e12, 32e9, 8, 1.0),
}


def bandwidth(text: str) -> float:
    """`400Gb` and `50GB` in bytes per second."""
    for unit, size in (("Gb", 1e9 / 8), ("GB", 1e9), ("Tb", 1e12 / 8)):
        number = text.removesuffix(unit)
        if number != text:
            try:
                rate = float(number) * size
            except ValueError:
                break
            if 0 < rate < math.inf:
                return rate
    raise UserError(f"--net {text}: write it as 400Gb (bits per second and GPU) or 50GB (bytes)")


# Of a training process on a CPU beyond its tensors: code pages that the kernels' libraries touch, and Python's objects;
# and glibc's malloc, which cannot fill all the gaps that blocks of changing sizes leave. Fitted to the memory of the
# runs that are marked in benchmarks/results/plan.md.
CPU_RUNTIME = 48 * 2**20
CPU_SLACK = 1.7
# Operations of a step for each parameter tensor. PyTorch's profiler counts 90 on `tiny`, those within others included
# (13,500 in stage 2 and 14,800 in stage 0 for 157 tensors; AdamW alone takes half of them). The rest stands for the
# Python around them, modules and DeepSpeed's hooks, and is fitted to the run that is marked in plan.md.
CPU_OPERATIONS = 120


def measured_cpu(width: int, seconds: float = 0.3) -> Gpu:
    """One core of this machine as a `Gpu`, measured now: fp32 products of a model of this width, copies, operations.

    CPU time is what is counted, so that other work on the machine changes it little.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, inner = 512, 4 * width
        x, weight = (torch.randn(size, width, requires_grad=True) for size in (rows, inner))
        gradient = torch.randn(rows, inner)
        products = _median(lambda: torch.autograd.grad(linear(x, weight), (x, weight), gradient), seconds)
        flops = 3 * 2 * rows * width * inner / products
        source, target = torch.ones(2**24), torch.ones(2**24)  # touched: untouched pages would all be one
        copied = 2 * 4 * 2**24 / _median(lambda: target.copy_(source), seconds)
        weight_s = _weight_s(width, inner, seconds, flops)
        x = x.detach()
        mixed = (lambda: x + x, lambda: F.gelu(x), lambda: F.layer_norm(x, (width,)))
        element_wise = 3 * 2 * 4 * rows * width / sum(_median(work, seconds) for work in mixed)
        one = torch.ones(1)
        operation_s = _median(lambda: one + one, seconds)
    finally:
        torch.set_num_threads(before)
    # Twice, because fp32 is taken for half of a GPU's bf16 peak. What is measured here needs no efficiency.
    return Gpu(
        flops=2 * flops,
        memory=math.inf,
        hbm=copied,
        neighbours=copied,
        per_machine=1,
        price=None,
        efficiency=1.0,
        step_copies=0.0,
        step_copies_unsharded=0.0,
        operations=CPU_OPERATIONS,
        operation_s=operation_s,
        is_host=True,
        runtime=CPU_RUNTIME,
        slack=CPU_SLACK,
        element_wise=element_wise,
        adamw_bytes=28,  # fused: four reads and three writes
        weight_s=weight_s,
    )


def _weight_s(width: int, inner: int, seconds: float, flops: float) -> float:
    """By products of few rows with weights that no cache holds all of. The library also copies each into a layout of
    its own first."""
    rows, weights = 16, [torch.randn(inner, width, requires_grad=True) for _ in range(-(-(2**26) // (inner * width)))]
    x, gradient = torch.randn(rows, width, requires_grad=True), torch.randn(rows, inner)

    def work() -> None:
        for weight in weights:
            torch.autograd.grad(linear(x, weight), (x, weight), gradient)

    operations = 3 * 2 * rows * width * inner * len(weights)
    return max(0.0, _median(work, seconds) - operations / flops) / (4 * width * inner * len(weights))


def _median(work: Callable[[], object], seconds: float) -> float:
    readings, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(readings) < 5:
        start = time.process_time()
        work()
        readings.append(time.process_time() - start)
    return statistics.median(readings)
