"""Position tables of image towers at another resolution."""

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmscale.errors import UserError


def resize_positions(table: Tensor, grid: int, prefix: int) -> Tensor:
    """[prefix + old grid squared, width] to [prefix + grid squared, width], bicubic and antialiased.

    Args:
        prefix: rows before the grid's (1 for a class token), which are kept.

    Raises:
        UserError: the table's grid is not a square.
    """
    old = math.isqrt(len(table) - prefix)
    if old * old != len(table) - prefix:
        raise UserError(f"a position table of {len(table)} rows is not {prefix} and a square")
    if old == grid:
        return table
    square = table[prefix:].T.reshape(1, -1, old, old).float()
    square = interpolate(square, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    rows = square.flatten(2)[0].T.to(table.dtype)
    return torch.cat([table[:prefix], rows])
