"""Linear layers, computed by the faster of the two matrix libraries that PyTorch carries for CPUs.

PyTorch multiplies fp32 matrices on x86 with MKL, which uses half of the vector width of an AMD processor: on two cores
of an EPYC it reached 190 GFLOP/s where oneDNN reached 410. oneDNN is behind an operator that `torch.compile` uses; here
it is reached without compiling anything.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Below this size of a weight the set-up of a oneDNN call costs more than it saves.
ONEDNN_MIN_ELEMENTS = 1 << 18


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., inputs], weight [outputs, inputs], bias [outputs] to [..., outputs]."""
    multiply = multiplier(x, weight)
    if multiply is _onednn_linear and torch.is_grad_enabled():
        return _OneDNNLinear.apply(x, weight, bias)
    return multiply(x, weight, bias)


def multiplier(x: Tensor, weight: Tensor) -> Callable[..., Tensor]:
    """The function for this product and for those of its gradients: like `F.linear`, but perhaps not differentiable.

    oneDNN's operator has no rule for tensor subclasses, for autocast and for graphs, and none for no rows at all, which
    the texts of a micro-batch of bad samples have.
    """
    onednn = (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and weight.numel() >= ONEDNN_MIN_ELEMENTS
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )
    return _onednn_linear if onednn else F.linear


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
