"""The learned temperature of the contrastive loss."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .configuration_mmscale import MMScaleConfig


class LogitScale(nn.Module):
    """Temperature of the contrastive loss, as a logarithm bounded from above; and the sigmoid loss's bias."""

    def __init__(self, config: MMScaleConfig):
        super().__init__()
        self.init = (config.logit_scale_init, config.logit_bias_init)
        self.limit = math.log(config.logit_scale_max)
        # One element each, not zero dimensions: sharding by DeepSpeed cannot view a 0-dim parameter as bytes.
        self.log_scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1)) if config.logit_bias_init is not None else None

    def forward(self) -> Tensor:
        """[2] in fp32: the scale, and the bias (0 where there is none)."""
        scale = _BoundedLog.apply(self.log_scale.float(), self.limit).exp()
        bias = self.bias.float() if self.bias is not None else torch.zeros_like(scale)
        return torch.cat([scale, bias])

    def reset_parameters(self):
        nn.init.constant_(self.log_scale, self.init[0])
        if self.bias is not None:
            nn.init.constant_(self.bias, self.init[1])


class _BoundedLog(torch.autograd.Function):
    """min(x, limit), with no gradient at the limit that would push x further out.

    The parameter is never written to: with sharded training a write to the module's copy misses the optimizer's.
    Whether a gradient pushes outwards is decided on the mean over all ranks, so that every rank decides the same. Away
    from the limit, which is where a run mostly is, nobody has to ask the others; only a GPU does not know where it is
    without waiting.
    """

    @staticmethod
    def forward(ctx, x, limit):
        ctx.at_limit = x.detach() >= limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx, grad):
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and (grad.device.type != "cpu" or bool(ctx.at_limit)):
            grad = grad.clone()
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        return grad.masked_fill(ctx.at_limit & (grad < 0), 0.0), None
