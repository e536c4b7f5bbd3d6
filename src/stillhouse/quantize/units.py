"""A model's quantizable matrices, in units that are quantized or left alone together: what
quantizing each unit costs, and which ones to leave alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from stillhouse.data.windows import WindowSet
from stillhouse.errors import RecipeError
from stillhouse.evaluation.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.progress import bar
from stillhouse.quantize.grid import Grid, choose_scales
from stillhouse.quantize.moments import Moments
from stillhouse.quantize.quantization import Quantization

EMBEDDINGS = "embeddings"
HEAD = "head"
KEPT_BYTES = 2
"""Numbers that are not quantized are exported as bfloat16 or float16."""

Scales = dict[str, Tensor]
"""Scales [O, G] by the name of their matrix."""


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


@dataclass(frozen=True)
class Sensitivity:
    """The effect of quantizing only one unit.

    kl: KL(model ‖ model with only this unit quantized), in nats/token.
    saved: bytes.
    """

    unit: str
    kl: float
    saved: int


def scales_of(
    model: nn.Module, units: list[Unit], grid: Grid, moments: Moments | None = None
) -> Scales:
    """The scales of every matrix in the units, by the matrix's name."""
    weights, known = dict(model.named_parameters()), moments or {}
    return {
        name: choose_scales(weights[name], grid, known.get(name))
        for unit in units
        for name in unit.weights
    }


@contextmanager
def quantized(model: Any, quantization: Quantization) -> Iterator[None]:
    """Within the context, round the model's matrices, and layers' inputs if the export does."""
    weights = dict(model.named_parameters())
    before = {name: weights[name].detach().clone() for name in quantization.scales}
    hooks = quantization.round_inputs(model)
    try:
        quantization.apply(model)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in before.items():
            weights[name].data.copy_(weight)


def reference_answers(model: Any, windows: WindowSet) -> HeldoutAnswers:
    """The model's outputs, with a copy of its head, so that quantization does not change it."""
    answers = heldout_answers(model, windows)
    head = answers.signal.head
    own = replace(head, weight_VD=head.weight_VD.detach().clone())
    return replace(answers, signal=replace(answers.signal, head=own))


def kl_of(
    model: Any,
    quantization: Quantization,
    windows: WindowSet,
    reference: HeldoutAnswers,
    vocabulary: int,
) -> float:
    """KL(model ‖ quantized model), in nats/token. reference: the model's `reference_answers` on the
    same windows."""
    with quantized(model, quantization):
        return compare(heldout_answers(model, windows), reference, vocabulary).kl


def measure(
    units: list[Unit], scales: Scales, grid: Grid, kl: Callable[[Quantization], float]
) -> list[Sensitivity]:
    """Quantize the weights of each unit alone. kl: measures the cost (see `kl_of`)."""
    found = []
    with bar("Sensitivity", len(units), unit="units") as advance:
        for unit in units:
            own = Quantization(grid, False, {name: scales[name] for name in unit.weights})
            found.append(Sensitivity(unit.name, kl(own), unit.bytes(None) - unit.bytes(grid)))
            advance(1)
    return found


def choose_kept(
    sensitivities: list[Sensitivity],
    *,
    smallest: int,
    max_kl: float | None = None,
    max_bytes: int | None = None,
) -> list[str]:
    """Choose the units not to quantize: those that add the most KL per byte that they save.

    KL is assumed to add up over units, which is nearly true as long as it is small.

    smallest: the model's size in bytes with every unit quantized.
    max_kl: keep units unquantized until the KL of the others is at most this; None, with max_bytes:
        as many as fit.
    max_bytes: maximum size of the whole model.

    Raises RecipeError if the model does not fit max_bytes even with every unit quantized.
    """
    if max_bytes is not None and smallest > max_bytes:
        raise RecipeError(
            f"even with everything quantized, the model has {smallest:,} bytes, more than "
            f"{max_bytes:,}",
            where="quantize.max_bytes",
            fix="raise it, use int4 or a larger group_size, or make the student smaller",
        )
    if max_kl is None and max_bytes is None:
        return []
    left = sum(s.kl for s in sensitivities)
    room = float("inf") if max_bytes is None else max_bytes - smallest
    kept = []
    for s in sorted(sensitivities, key=lambda s: s.kl / s.saved, reverse=True):
        if max_kl is not None and left <= max_kl:
            break
        if s.saved <= room:
            kept.append(s.unit)
            room -= s.saved
            left -= s.kl
    return kept
