"""GGUF blocks of Stillhouse's own grid: a quantized student's numbers as they are, or rounded here.

Shapes: O rows, I columns, G groups in a row, K blocks in a row, b numbers of a block (32).

q4_0 and q8_0 hold d·q with d in float16 and q a whole number of 4 or 8 bits, which is just what
`stillhouse.quantize.grid` makes. q4_0 stores q + 8, a block's second half in the high four bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from stillhouse.export.gguf_file import GGUFFormat, Packed, kind_of
from stillhouse.quantize import Grid, Quantization, choose_scales, to_codes
from stillhouse.quantize.moments import Moments

BLOCK = 32
BITS: dict[Kind, Literal[4, 8]] = {Kind.Q4_0: 4, Kind.Q8_0: 8}


def fitting_kind(grid: Grid, form: GGUFFormat) -> Kind | None:
    """The block type of this format that holds the grid exactly; None: it has none."""
    bits = BITS.get(form.kind)
    whole = not grid.floating and grid.group is not None and grid.group % BLOCK == 0
    return form.kind if whole and bits is not None and grid.bits <= bits else None


def packed_blocks(weight_OI: Tensor, scales_OG: Tensor, grid: Grid, kind: Kind) -> Packed:
    """The blocks of a matrix, uint8 [O, bytes of a row]: exact where it is on the grid."""
    codes_OKb = to_codes(weight_OI, scales_OG, grid).unflatten(-1, (-1, BLOCK))
    scales_OK = scales_OG.repeat_interleave(codes_OKb.shape[-2] // scales_OG.shape[-1], dim=-1)
    d = scales_OK.half()[..., None].contiguous().view(torch.uint8)
    if kind is Kind.Q8_0:
        q = codes_OKb.contiguous().view(torch.uint8)
    else:
        shifted = (codes_OKb + 8).to(torch.uint8)
        q = shifted[..., : BLOCK // 2] | (shifted[..., BLOCK // 2 :] << 4)
    blocks = torch.cat([d, q], dim=-1).flatten(-2)
    return kind, np.ascontiguousarray(blocks.numpy())


def pack(
    weights: dict[str, Tensor], quantization: Quantization, form: GGUFFormat
) -> dict[str, Packed]:
    """The blocks of every quantized matrix, where the format holds the grid."""
    kind = fitting_kind(quantization.grid, form)
    if kind is None:
        return {}
    return {
        name: packed_blocks(weights[name], scales_OG, quantization.grid, kind)
        for name, scales_OG in quantization.scales.items()
    }


def pack_weighed(
    weights: Mapping[str, Tensor],
    moments: Moments,
    names: Mapping[str, str],
    form: GGUFFormat,
) -> dict[str, Packed]:
    """The blocks of every matrix that the format stores as d·q, its rounding errors weighed.

    moments: E[x²] of its inputs; names: of each matrix in GGUF. What is missing here is rounded by
    the gguf package, all errors alike.
    """
    packed = {}
    for name, moment_I in moments.items():
        weight_OI = weights[name]
        kind = kind_of(names[name], list(weight_OI.shape), form)
        if kind in BITS:
            grid = Grid(BITS[kind], BLOCK)
            scales_OG = choose_scales(weight_OI, grid, moment_I)
            packed[name] = packed_blocks(weight_OI, scales_OG, grid, kind)
    return packed
