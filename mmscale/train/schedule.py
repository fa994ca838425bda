"""The learning rate as a pure function of the samples that were consumed, so that it needs no state to resume."""

import math

from mmscale.config import OptimConfig


def learning_rate(optim: OptimConfig, samples: int, batch: int, total: int) -> float:
    """The rate of the update that consumes samples [samples, samples + batch) of a run of `total` samples.

    Linear warm-up reaches `lr` with the update that consumes sample `warmup_samples`; then a cosine falls to
    `min_lr_fraction` of it at `total` (https://arxiv.org/abs/1608.03983, without restarts).
    """
    if samples < optim.warmup_samples:
        return optim.lr * min(1.0, (samples + batch) / optim.warmup_samples)
    progress = min(1.0, (samples - optim.warmup_samples) / max(1, total - optim.warmup_samples))
    floor = optim.min_lr_fraction
    return optim.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
