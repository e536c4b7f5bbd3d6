"""Quantization grids, and rounding to them.

A quantized weight is w = s·q, where q is a 4-bit or 8-bit integer, or a float8 number (e4m3: 4 bits
of exponent, 3 of mantissa), and s is a scale that `group` neighbors in a row, or the whole row,
share. Scales are float16 numbers, so that s·q is exact in float32, and every format that stores q
and s (torchao's, and GGUF's q4_0 and q8_0) contains exactly the same weights.

Shapes: O rows (outputs), I columns (inputs), G groups in a row, g numbers in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LARGEST = {4: (-8.5, -8.0, -7.5, -7.0, 7.0, 7.5), 8: (-128.0, 127.0)}
"""Grid positions to try for a group's largest number. Each implies a scale; the scale with the
least squared error is used. Beyond the grid's end, that number is clipped, and the others gain
precision. The sign determines whether it is on the side with one more integer."""

WEIGHTED = {
    4: tuple(sign * float(place) for place in range(6, 15) for sign in (-1, 1)),
    8: tuple(sign * float(place) for place in range(118, 135, 4) for sign in (-1, 1)),
}
"""The same for weighted errors, where a large number on an unimportant input can be clipped by a
lot in favor of its neighbors."""

FLOAT8 = torch.float8_e4m3fn
FLOAT8_PLACES = tuple(float(place) for place in range(256, 449, 32))
"""The same for float8, weighted or not. Positions within the last octave suffice, because scales
that differ by a power of two round to the same (normal) numbers."""


@dataclass(frozen=True)
class Grid:
    """A quantization grid.

    bits: size of a code q.
    group: how many neighbors share a scale; None: the whole row.
    floating: whether q is float8 instead of an integer.
    """

    bits: Literal[4, 8]
    group: int | None
    floating: bool = False

    @property
    def name(self) -> str:
        return f"{'float' if self.floating else 'int'}{self.bits}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes q."""
        return FLOAT8 if self.floating else torch.int8

    @property
    def lowest(self) -> int:
        return -self.highest if self.floating else -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return int(torch.finfo(FLOAT8).max) if self.floating else 2 ** (self.bits - 1) - 1

    def bytes(self, numbers: int, rows: int) -> int:
        """Size of a whole matrix in bytes: packed codes, and two bytes per scale."""
        scales = rows if self.group is None else numbers // self.group
        return numbers * self.bits // 8 + scales * 2

    def places(self, weighted: bool) -> tuple[float, ...]:
        """The grid positions to try for a group's largest number."""
        if self.floating:
            return FLOAT8_PLACES
        return (WEIGHTED if weighted else LARGEST)[self.bits]

    def groups(self, numbers_I: Tensor) -> Tensor:
        """Reshape [..., I] to [..., G, g], in float32."""
        width = numbers_I.shape[-1] if self.group is None else self.group
        return numbers_I.detach().float().unflatten(-1, (-1, width))


def choose_scales(weight_OI: Tensor, grid: Grid, moment_I: Tensor | None = None) -> Tensor:
    """Choose the scales [O, G] with the least squared error, in float32 but exact in float16.

    A group of zeros has scale 0. The group size must divide the number of columns.

    moment_I: each input's E[x²], which weights the error (see `stillhouse.quantize.moments`); None:
        unweighted.
    """
    groups_OGg = grid.groups(weight_OI)
    place_OG1 = groups_OGg.abs().argmax(-1, keepdim=True)
    extreme_OG = groups_OGg.gather(-1, place_OG1).squeeze(-1)
    counts_Gg: Tensor | float = 1.0
    if moment_I is not None:
        counts_Gg = grid.groups(moment_I.to(weight_OI.device))
    best_OG = torch.zeros_like(extreme_OG)
    least_OG = torch.full_like(extreme_OG, torch.inf)
    for largest in grid.places(weighted=moment_I is not None):
        scale_OG = (extreme_OG / largest).half().float()
        error_OGg = groups_OGg - _rounded(groups_OGg, scale_OG, grid) * scale_OG[..., None]
        error_OG = (error_OGg.square() * counts_Gg).sum(-1)
        better_OG = error_OG < least_OG
        best_OG = torch.where(better_OG, scale_OG, best_OG)
        least_OG = torch.where(better_OG, error_OG, least_OG)
    return best_OG


def to_codes(weight_OI: Tensor, scales_OG: Tensor, grid: Grid) -> Tensor:
    """The codes q [O, I], in int8 or float8: weight / scale, rounded to nearest, ties to even."""
    return _rounded(grid.groups(weight_OI), scales_OG, grid).flatten(-2).to(grid.dtype)


def on_grid(weight_OI: Tensor, scales_OG: Tensor, grid: Grid) -> Tensor:
    """The nearest weights on the grid, in float32."""
    return (_rounded(grid.groups(weight_OI), scales_OG, grid) * scales_OG[..., None]).flatten(-2)


def _rounded(groups_OGg: Tensor, scales_OG: Tensor, grid: Grid) -> Tensor:
    safe_OG1 = torch.where(scales_OG == 0, torch.inf, scales_OG)[..., None]
    codes_OGg = groups_OGg / safe_OG1
    if grid.floating:  # Beyond float8's largest number, the cast would return NaN: clamp first.
        return codes_OGg.clamp_(grid.lowest, grid.highest).to(FLOAT8).float()
    return codes_OGg.round_().clamp_(grid.lowest, grid.highest)
