"""The feed-forward part of a block, which keeps one wide activation for the backward pass instead of two."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear, multiplier


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, mlp_ratio: float, activation: str, depth: int):
        super().__init__()
        self.depth = depth
        self.up = Linear(width, int(width * mlp_ratio))
        self.down = ActivatedLinear(int(width * mlp_ratio), width, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))

    def reset_parameters(self):
        width = self.up.in_features
        init_linear(self.up, (2 * width) ** -0.5)
        init_linear(self.down, (2 * self.depth * width) ** -0.5)


class ActivatedLinear(Linear):
    """A linear layer of the activation of its input.

    Args:
        activation: `gelu`, `gelu_tanh` (as SigLIP was trained with) or `quick_gelu` (as OpenAI's CLIP was).
    """

    def __init__(self, in_features: int, out_features: int, activation: str):
        super().__init__(in_features, out_features)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: `{activation}` is not one of {', '.join(ACTIVATIONS)}")
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _ActivatedLinear.apply(x, self.weight, self.bias, self.activation)
        return super().forward(ACTIVATIONS[self.activation](x))


class _ActivatedLinear(torch.autograd.Function):
    """Keeps the input and computes the activation once more in the backward pass: cheap beside the matrix products."""

    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        ctx.activation = activation
        device = x.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(ctx.dtype)
        ctx.save_for_backward(x, weight)  # the weight itself, not its cast: sharded training may release it meanwhile
        with torch.autocast(device, enabled=False):
            weight = weight.to(ctx.dtype)
            return multiplier(x, weight)(ACTIVATIONS[activation](x), weight, bias.to(ctx.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        rows, matrix = grad.flatten(0, -2), weight.to(ctx.dtype)
        multiply = multiplier(x, matrix)
        activated = ACTIVATIONS[ctx.activation](x)
        d_weight = multiply(rows.T, activated.flatten(0, -2).T).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        del activated
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _DERIVATIVES[ctx.activation](multiply(grad, matrix.T), x)
        return d_x, d_weight, d_bias, None


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x)


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return grad * (gate + 1.702 * x * gate * (1 - gate))


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "quick_gelu": quick_gelu}
_DERIVATIVES = {"gelu": _gelu_backward, "gelu_tanh": _gelu_tanh_backward, "quick_gelu": _quick_gelu_backward}


def init_linear(linear: nn.Linear, std: float):
    """Normal weights, no bias."""
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
