"""The grid of whole numbers that a quantized matrix lives on, and the rounding onto it.

Shapes: O rows (outputs), I columns (inputs), G groups in a row.

A weight is w = s·q: q a whole number of 4 or 8 bits, s a scale that `group` neighbours in a row
share. Scales are float16 numbers, so that s·q is exact in float32, and every format that stores q
and s (torchao's, GGUF's q4_0 and q8_0) holds exactly the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LARGEST = {4: (-8.5, -8.0, -7.5, -7.0, 7.0, 7.5), 8: (-128.0, 127.0)}
"""Where on the grid a group's number of largest size may come to lie: each makes a scale, and the
one with the least squared error is taken. Past the grid's end, that number is clipped and the
others gain; the sign chooses which side has the one whole number more."""

WEIGHED = {
    4: tuple(sign * float(place) for place in range(6, 15) for sign in (-1, 1)),
    8: tuple(sign * float(place) for place in range(118, 135, 4) for sign in (-1, 1)),
}
"""The same where errors are weighed: a large number on an input that hardly matters may be clipped
by far, so that its neighbours gain."""


@dataclass(frozen=True)
class Grid:
    bits: Literal[4, 8]
    group: int

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def bytes(self, numbers: int) -> int:
        """Of a matrix that is stored whole: q packed, and two bytes for each scale."""
        return numbers * self.bits // 8 + numbers // self.group * 2


def choose_scales(weight_OI: Tensor, grid: Grid, moment_I: Tensor | None = None) -> Tensor:
    """The scales [O, G] with the least squared error, float32 numbers that float16 holds.

    moment_I: E[x²] of each input, by which a weight's error counts (`stillhouse.quantize.moments`);
    None: all count alike. A group of zeros has scale 0. The group size must divide the columns.
    """
    groups_OGg = weight_OI.detach().float().unflatten(-1, (-1, grid.group))
    place_OG1 = groups_OGg.abs().argmax(-1, keepdim=True)
    extreme_OG = groups_OGg.gather(-1, place_OG1).squeeze(-1)
    counts_Gg: Tensor | float = 1.0
    if moment_I is not None:
        counts_Gg = moment_I.to(weight_OI.device).float().unflatten(-1, (-1, grid.group))
    best_OG = torch.zeros_like(extreme_OG)
    least_OG = torch.full_like(extreme_OG, torch.inf)
    for largest in (LARGEST if moment_I is None else WEIGHED)[grid.bits]:
        scale_OG = (extreme_OG / largest).half().float()
        error_OGg = groups_OGg - _rounded(groups_OGg, scale_OG, grid) * scale_OG[..., None]
        error_OG = (error_OGg.square() * counts_Gg).sum(-1)
        better_OG = error_OG < least_OG
        best_OG = torch.where(better_OG, scale_OG, best_OG)
        least_OG = torch.where(better_OG, error_OG, least_OG)
    return best_OG


def to_codes(weight_OI: Tensor, scales_OG: Tensor, grid: Grid) -> Tensor:
    """The whole numbers q, int8 [O, I], nearest to weight ÷ scale; ties go to the even one."""
    groups_OGg = weight_OI.detach().float().unflatten(-1, (-1, grid.group))
    return _rounded(groups_OGg, scales_OG, grid).flatten(-2).to(torch.int8)


def from_codes(codes_OI: Tensor, scales_OG: Tensor) -> Tensor:
    """The weights s·q, float32 [O, I], without rounding."""
    groups = scales_OG.shape[-1]
    return (codes_OI.float().unflatten(-1, (groups, -1)) * scales_OG.float()[..., None]).flatten(-2)


def on_grid(weight_OI: Tensor, scales_OG: Tensor, grid: Grid) -> Tensor:
    """The nearest weights on the grid, float32."""
    groups_OGg = weight_OI.detach().float().unflatten(-1, (-1, grid.group))
    return (_rounded(groups_OGg, scales_OG, grid) * scales_OG[..., None]).flatten(-2)


def _rounded(groups_OGg: Tensor, scales_OG: Tensor, grid: Grid) -> Tensor:
    safe_OG1 = torch.where(scales_OG == 0, torch.inf, scales_OG)[..., None]
    return (groups_OGg / safe_OG1).round_().clamp_(grid.lowest, grid.highest)
