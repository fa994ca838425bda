"""Tables that say which of our tensors are which of another library's, and what carries weights over by them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmscale.errors import UserError


@dataclass(frozen=True)
class Row:
    """A line of a table: which of our tensors are which of theirs.

    `kind` says how: `same`; `transposed`; `patches` (theirs is a convolution's weight); `scalar` (theirs has no
    dimension); or `stacked` (ours one above the other are theirs one above the other, `units` tell how tall each is).
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    kind: str = "same"
    units: tuple[tuple[int, ...], tuple[int, ...]] = ((1,), (1,))


def row(ours: str, theirs: str, kind: str = "same") -> Row:
    return Row((ours,), (theirs,), kind)


def linear(ours: str, theirs: str) -> Iterator[Row]:
    """A linear layer or a norm: both have a weight and a bias."""
    for part in ("weight", "bias"):
        yield row(f"{ours}.{part}", f"{theirs}.{part}")


def to_theirs(table: Iterable[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by name as theirs; raises KeyError when one is missing."""
    found = {}
    for line in table:
        parts = _convert(line.kind, [tensors[name] for name in line.ours], line.units[1], forward=True)
        found.update(zip(line.theirs, parts, strict=True))
    return found


def to_ours(table: Iterable[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by name as ours; raises KeyError when one is missing."""
    found = {}
    for line in table:
        parts = _convert(line.kind, [tensors[name] for name in line.theirs], line.units[0], forward=False)
        found.update(zip(line.ours, parts, strict=True))
    return found


def _convert(kind: str, given: list[Tensor], units: tuple[int, ...], forward: bool) -> list[Tensor]:
    if kind == "stacked":
        rows = torch.cat(given)
        return [part.clone() for part in rows.split([len(rows) // sum(units) * unit for unit in units])]
    (tensor,) = given
    if kind == "transposed":
        tensor = tensor.T
    elif kind == "patches":
        size = math.isqrt(tensor[0].numel() // 3)
        tensor = tensor.unflatten(1, (3, size, size)) if forward else tensor.flatten(1)
    elif kind == "scalar":
        tensor = tensor.squeeze() if forward else tensor.reshape(1)
    return [tensor.contiguous()]


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
