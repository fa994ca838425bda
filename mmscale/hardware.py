"""What a plan has to know about machines: GPUs by their data sheets, this machine's CPU by measuring it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmscale.errors import UserError

GIB = 2**30
EFFICIENCY = 0.55  # of the peak, for large bf16 products as cuBLAS does them


@dataclass(frozen=True)
class Gpu:
    """One accelerator: dense bf16 FLOP/s, memory [bytes] and its bandwidth, and the bandwidth to its neighbours."""

    flops: float
    memory: float
    hbm: float
    neighbours: float
    per_machine: int
    price: float | None  # per hour, as clouds asked for it in 2025; --price overrides
    efficiency: float = EFFICIENCY
    step_copies: float = 1.0  # of the second moments, which PyTorch's AdamW makes while it updates
    step_copies_unsharded: float = 1.0  # the same where the parameters are not one flat tensor


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
                return float(number) * size
            except ValueError:
                break
    raise UserError(f"--net {text}: write it as 400Gb (bits per second and GPU) or 50GB (bytes)")


def measured_cpu(threads: int, seconds: float = 0.5) -> Gpu:
    """This machine's CPU as a `Gpu`: its fp32 matrix products and memory bandwidth, measured now."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(512, 768), torch.randn(768, 768)
        flops = 2 * 512 * 768**2 / _best(lambda: a @ b, seconds)
        source, target = torch.ones(2**24), torch.ones(2**24)  # touched: untouched pages would all be one
        copied = 2 * 4 * 2**24 / _best(lambda: target.copy_(source), seconds)
    finally:
        torch.set_num_threads(before)
    # Twice, because fp32 is taken for half of a GPU's bf16 peak. What is measured here needs no efficiency.
    return Gpu(2 * flops, math.inf, copied, copied, 1, None, efficiency=1.0, step_copies=0.0, step_copies_unsharded=0.0)


def _best(work: Callable[[], object], seconds: float) -> float:
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
