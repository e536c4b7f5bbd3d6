"""GGUF blocks from Stillhouse's own grid: a quantized student's exact numbers, or numbers rounded
here.

q4_0 and q8_0 store d·q, where d is float16 and q is a 4-bit or 8-bit integer, just like
`stillhouse.quantize.grid`. q4_0 stores q + 8, with a block's second half in the high four bits.

Shapes: O rows, I columns, G groups in a row, K blocks in a row, b numbers in a block (32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from stillhouse.export.gguf_file import FORMATS, GGUFFormat, Packed, kind_of
from stillhouse.quantize.grid import Grid, choose_scales, to_codes
from stillhouse.quantize.moments import Moments
from stillhouse.quantize.quantization import Quantization

BLOCK = 32
BITS: dict[Kind, Literal[4, 8]] = {Kind.Q4_0: 4, Kind.Q8_0: 8}
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)


def fitting_kind(grid: Grid, form: GGUFFormat) -> Kind | None:
    """This format's block type if it can store the grid exactly, else None."""
    bits = BITS.get(form.kind)
    fits = not grid.floating and grid.group is not None and grid.group % BLOCK == 0
    return form.kind if fits and bits is not None and grid.bits <= bits else None


def second_rounding(grid: Grid, kind: str) -> tuple[str, str] | None:
    """A warning, and how to avoid it, if `kind` cannot store this grid exactly; else None."""
    form = FORMATS.get(kind)  # None: a k-quant
    if form is not None and (form.kind in FLOATS or fitting_kind(grid, form) is not None):
        return None
    holding = [f"gguf-{name}" for name, form in FORMATS.items() if fitting_kind(grid, form)]
    fix = f"use {' or '.join(holding)} to store them exactly"
    if grid.floating:
        fix = "export safetensors to store them exactly, or use quantize.kind: int8 with gguf-q8_0"
    elif not holding:
        fix = f"use quantize.group_size: {BLOCK} with gguf-q{grid.bits}_0, or export safetensors"
    width = "" if grid.group is None else f" in groups of {grid.group}"
    text = f"gguf-{kind} cannot store {grid.name}{width}, so the weights are rounded a second time"
    return text, fix


def for_kept(
    weights: Mapping[str, Tensor], packed: Mapping[str, Packed], form: GGUFFormat
) -> GGUFFormat:
    """The format with 16-bit floats for parts that are not quantized, as in size estimates.

    This is float16, which has three more bits of mantissa, or bfloat16 if a weight needs its range.
    """
    largest = max(
        (float(w.abs().max()) for name, w in weights.items() if w.ndim > 1 and name not in packed),
        default=0.0,
    )
    kept = FORMATS["f16" if largest <= torch.finfo(torch.float16).max else "bf16"]
    return replace(form, kind=kept.kind, embeddings=kept.kind, kl_limit=kept.kl_limit)


def packed_blocks(weight_OI: Tensor, scales_OG: Tensor, grid: Grid, kind: Kind) -> Packed:
    """A matrix's blocks, uint8 [O, bytes per row]; exact if the matrix is on the grid."""
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
    weights: Mapping[str, Tensor], quantization: Quantization, kind: Kind
) -> dict[str, Packed]:
    """The blocks of every quantized matrix. kind: a block type that can store the grid."""
    return {
        name: packed_blocks(weights[name], scales_OG, quantization.grid, kind)
        for name, scales_OG in quantization.scales.items()
    }


def pack_weighted(
    weights: Mapping[str, Tensor],
    moments: Moments,
    names: Mapping[str, str],
    form: GGUFFormat,
) -> dict[str, Packed]:
    """The blocks of every matrix that the format stores as d·q, with weighted rounding errors.

    The gguf package rounds all other matrices, with unweighted errors.

    moments: E[x²] of each matrix's inputs.
    names: each matrix's name in GGUF.
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
