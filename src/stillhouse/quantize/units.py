"""A model's quantizable matrices, in units that are quantized or left alone together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stillhouse.errors import RecipeError
from stillhouse.quantize.grid import Grid

EMBEDDINGS = "embeddings"
HEAD = "head"
KEPT_BYTES = 2
"""Numbers that are not quantized are exported as bfloat16 or float16."""


@dataclass(frozen=True)
class Unit:
    """Matrices that are quantized or left alone together.

    A head that is tied to the embeddings is part of them, and counts once.

    name: `embeddings`, `head`, or `layers.N`; for other matrices, the matrix's name.
    weights: names of the unit's matrices in the model.
    numbers, rows: totals over these matrices.
    """

    name: str
    weights: list[str]
    numbers: int
    rows: int

    def bytes(self, grid: Grid | None) -> int:
        """Size in bytes on the grid; None: not quantized."""
        return self.numbers * KEPT_BYTES if grid is None else grid.bytes(self.numbers, self.rows)


def find_units(model: Any, grid: Grid) -> list[Unit]:
    """The model's units, in the model's order.

    Raises RecipeError if the group size does not divide a matrix's row length.
    """
    weights, found = dict(matrices(model)), dict[str, list[str]]()
    for name, weight in weights.items():
        if grid.group is not None and weight.shape[-1] % grid.group:
            raise _uneven(name, weight.shape[-1], grid)
        found.setdefault(_unit_name(model, name, weight), []).append(name)
    units = []
    for name, names in found.items():
        own = [weights[one] for one in names]
        units.append(Unit(name, names, sum(one.numel() for one in own), sum(map(len, own))))
    return units


def matrices(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of linear layers and embeddings; tied weights only once, by their first name."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield f"{name}.weight", module.weight


def left_over(model: Any) -> dict[str, int]:
    """Parameters that no unit contains although they have two or more dimensions, with their sizes:
    fused experts, transposed or convolved matrices, routers."""
    in_units = {id(weight) for _, weight in matrices(model)}
    return {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and id(weight) not in in_units
    }


def left_over_text(model: Any) -> str | None:
    """Describe the parts of a model that cannot be quantized; None if there are none."""
    left = left_over(model)
    if not left:
        return None
    share = sum(left.values()) / sum(weight.numel() for weight in model.parameters())
    largest = max(left, key=lambda name: left[name])
    return (
        f"{len(left):,} tensors with {share:.0%} of the parameters, such as {largest}, are not "
        f"weights of linear layers, so they are stored unquantized, in {8 * KEPT_BYTES} bits"
    )


def model_bytes(model: Any, units: list[Unit], kept: set[str], grid: Grid) -> int:
    """Bytes of all parameters, each counted once: quantized units on the grid, the rest in 16
    bits."""
    total = sum(parameter.numel() for parameter in model.parameters())
    rest = total - sum(unit.numbers for unit in units)
    shipped = sum(unit.bytes(None if unit.name in kept else grid) for unit in units)
    return rest * KEPT_BYTES + shipped


def _unit_name(model: Any, name: str, weight: Tensor) -> str:
    if weight is model.get_input_embeddings().weight:
        return EMBEDDINGS
    head = model.get_output_embeddings()
    if head is not None and weight is head.weight:
        return HEAD
    layer = re.search(r"\.(\d+)\.", name)
    return f"layers.{layer[1]}" if layer else name.removesuffix(".weight")


def _uneven(name: str, width: int, grid: Grid) -> RecipeError:
    fits = [size for size in (256, 128, 64, 32, 16) if width % size == 0]
    return RecipeError(
        f"{name} has {width} numbers per row, which is not a multiple of group_size {grid.group}",
        where="quantize.group_size",
        fix=f"use group_size: {fits[0]}"
        if fits
        else f"change the student's width to {max(32, width // 32 * 32)} or "
        f"{(width // 32 + 1) * 32}, a multiple of 32",
    )
