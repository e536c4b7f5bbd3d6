"""Measure the cost of quantizing each part of a model, and choose which parts not to quantize."""

from __future__ import annotations

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
from stillhouse.quantize.units import Unit

Scales = dict[str, Tensor]


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
