"""The learning rate as a pure function of the samples that were consumed, so that it needs no state to resume."""

import math

from mmscale.config import OptimConfig


def learning_rate(optim: OptimConfig, samples: int, batch: int, total: int) -> float:
    """The rate of the update that consumes samples [samples, samples + batch) of a run of `total` samples.

    Linear warm-up reaches `lr` with the update that consumes sample `warmup_samples`. Then, by `optim.schedule`:

    - `cosine` falls to `min_lr_fraction` of it at `total` (https://arxiv.org/abs/1608.03983, without restarts);
    - `constant` stays;
    - `wsd` stays and falls linearly over the last `decay_fraction` of the run (https://arxiv.org/abs/2404.06395).
    """
    if samples < optim.warmup_samples:
        return optim.lr * min(1.0, (samples + batch) / optim.warmup_samples)
    return optim.lr * (optim.min_lr_fraction + (1 - optim.min_lr_fraction) * _shape(optim, samples, total))


def _shape(optim: OptimConfig, samples: int, total: int) -> float:
    """From 1 to 0, before the floor is put under it."""
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "wsd":
        return min(1.0, max(0, total - samples) / max(1.0, optim.decay_fraction * total))
    progress = min(1.0, (samples - optim.warmup_samples) / max(1, total - optim.warmup_samples))
    return 0.5 * (1 + math.cos(math.pi * progress))
