"""Patch dropout (https://arxiv.org/abs/2212.00794) that depends on the sample alone."""

import torch
from torch import Tensor


def kept_patches(positions: Tensor, num_patches: int, keep: int, seed: int) -> Tensor:
    """Which patches survive patch dropout: a pure function of (seed, position of the sample in the stream).

    A 64-bit mixing function (the finaliser of splitmix64, http://xoshiro.di.unimi.it/splitmix64.c) ranks the patches of
    every sample, and the `keep` smallest stay. Integer arithmetic gives the same answer on every device.

    Args:
        positions: int64 [batch].

    Returns:
        int64 [batch, keep], in rising order.
    """
    patch = torch.arange(num_patches, device=positions.device)
    x = _mix64(positions + _mix64(torch.tensor(seed, device=positions.device)))
    x = _mix64(x[:, None] + (patch + 1) * _GOLDEN_GAMMA)
    return x.argsort(dim=1)[:, :keep].sort(dim=1).values


_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers, which wrap around as unsigned ones do


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's shifts of signed integers copy the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
