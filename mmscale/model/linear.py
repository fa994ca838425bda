"""Linear layers, computed by the faster of the two matrix libraries that PyTorch carries for CPUs.

PyTorch multiplies fp32 matrices on x86 with MKL, which uses half of the vector width of an AMD processor: on two cores
of an EPYC it reached 190 GFLOP/s where oneDNN reached 410. oneDNN is behind an operator that `torch.compile` uses; here
it is reached without compiling anything.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Below this size of a weight the set-up of a oneDNN call costs more than it saves.
ONEDNN_MIN_ELEMENTS = 1 << 18
# What packed weights are laid out for: about a batch of decoding.
PACKED_FOR_ROWS = 8


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    packed: Tensor | None = None  # the weight as oneDNN wants it, while `packed_weights` is open

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed)

    def pack(self):
        if _suits_onednn(self.weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACKED_FOR_ROWS)

    def unpack(self):
        self.packed = None


@contextmanager
def packed_weights(*models: nn.Module) -> Iterator[None]:
    """For many products of few rows with the same weights, such as the steps of decoding.

    oneDNN brings a weight into a layout of its own in every product, which costs more than the product where the rows
    are few. While this is open, layers with a method `pack` keep a second copy of their weights in the form that they
    compute with; the weights must not change meanwhile. Within another of its kind it leaves to that what that packed.
    """
    layers = [layer for model in models for layer in model.modules() if getattr(layer, "packed", layer) is None]
    try:
        for layer in layers:
            layer.pack()
        yield
    finally:
        for layer in layers:
            layer.unpack()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., inputs], weight [outputs, inputs], bias [outputs] to [..., outputs].

    `packed` is the same weight from `packed_weights`.
    """
    multiply = multiplier(x, weight)
    if multiply is not _onednn_linear:
        return multiply(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNNLinear.apply(x, weight, bias)
    return multiply(x, weight if packed is None else packed, bias)


def multiplier(x: Tensor, weight: Tensor) -> Callable[..., Tensor]:
    """The function for this product and for those of its gradients: like `F.linear`, but perhaps not differentiable.

    oneDNN's operator has no rule for tensor subclasses, for autocast and for graphs, and none for no rows at all, which
    the texts of a micro-batch of bad samples have.
    """
    onednn = (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and _suits_onednn(weight)
    )
    return _onednn_linear if onednn else F.linear


def _suits_onednn(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= ONEDNN_MIN_ELEMENTS
        and onednn_is_faster()
    )


@cache
def onednn_is_faster() -> bool:
    """On AMD processors with AVX-512, which MKL does not use there."""
    cpu = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and cpu.exists()
        and "AuthenticAMD" in cpu.read_text()
    )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        d_x = _onednn_linear(grad, weight.T) if ctx.needs_input_grad[0] else None
        d_weight = _onednn_linear(rows.T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None
        d_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return d_x, d_weight, d_bias
