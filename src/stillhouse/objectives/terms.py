"""Terms of a loss, mixtures of terms with scheduled weights, and their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives.objective_names import PARAMETERS, ScheduleShape


@dataclass(frozen=True)
class Term:
    """One summand of the loss: `weight · divergence(teacher, student)` at a temperature.

    The temperature T divides both models' logits. With `t_squared` (Hinton et al. 2015,
    arXiv 1503.02531, section 2.1) the divergence is multiplied by T², so that its gradient
    keeps its size as T grows. Cross-entropy with the data's own tokens always uses T = 1.
    A parameter that is None has its default from `PARAMETERS`.

    Raises:
        SignalError: unknown divergence, negative weight, temperature outside [0.001, 1000], or a
            parameter that the divergence does not have or that is out of range.
    """

    divergence: str
    weight: float = 1.0
    temperature: float = 1.0
    t_squared: bool = True
    alpha: float | None = None
    beta: float | None = None
    mu: float | None = None

    def __post_init__(self) -> None:
        if self.divergence not in PARAMETERS:
            raise SignalError(
                f"unknown divergence {self.divergence!r}",
                fix=f"use one of {', '.join(PARAMETERS)}",
            )
        if not 0 <= self.weight < math.inf:
            raise SignalError(
                f"the weight of {self.divergence} is {self.weight}: it must be finite and not "
                "negative"
            )
        if not 1e-3 <= self.temperature <= 1e3:
            raise SignalError(
                f"the temperature of {self.divergence} is {self.temperature}: it must be between "
                "0.001 and 1000"
            )
        if self.divergence == "cross_entropy" and self.temperature != 1.0:
            raise SignalError(
                "cross_entropy is only defined at temperature 1",
                fix="leave its temperature at 1",
            )
        self._check_parameters()

    def _check_parameters(self) -> None:
        known = PARAMETERS[self.divergence]
        for name in ("alpha", "beta", "mu"):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in known:
                raise SignalError(
                    f"{self.divergence} has no {name}",
                    fix=f"remove it; {self.divergence} accepts "
                    f"{', '.join(known) or 'no parameters'}",
                )
            top = math.inf if self.divergence == "alpha_beta" else 1.0
            if not 0 <= value <= top or math.isinf(value):
                raise SignalError(
                    f"{name} of {self.divergence} is {value}: it must lie in [0, {top:g}]"
                )
        if self.divergence == "alpha_beta" and not any(self.parameters.values()):
            raise SignalError("alpha_beta is not defined when alpha and beta are both 0")

    @property
    def parameters(self) -> dict[str, float]:
        """The divergence's parameters, defaults filled in."""
        return {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in PARAMETERS[self.divergence].items()
        }

    @property
    def needs_teacher(self) -> bool:
        return self.divergence != "cross_entropy"

    @property
    def factor(self) -> float:
        """What the divergence is multiplied by besides its weight: T², or 1."""
        return self.temperature**2 if self.t_squared else 1.0

    @property
    def gradient_factor(self) -> float:
        """A constant factored out of the divergence's h, which saves a pass."""
        beta = self.parameters.get("beta", 0.0)
        if self.divergence == "jsd":
            return 1.0 - beta
        if self.divergence == "normalized_jsd" and 0.0 < beta < 1.0:
            return 1.0 / beta
        return 1.0


@dataclass(frozen=True)
class LossSum:
    """A loss summed over rows; divide it once, by the global number of supervised rows.

    total: differentiable scalar, `scale · Σ_terms weight · term`.
    terms: each term's own sum over rows (including row weights and T², but neither its weight nor
        `scale`), detached, still on the device. Terms that share a divergence are named after
        what differs: "forward_kl@T2", "jsd@beta0.1".
    rows: number of supervised rows in the sum.
    """

    total: Tensor
    terms: dict[str, Tensor]
    rows: int


def term_names(terms: Sequence[Term]) -> list[str]:
    """A unique name for each term: see `name_among`. Raises SignalError if two are the same."""
    names = [name_among(terms, term) for term in terms]
    if len(set(names)) < len(names):
        raise SignalError(
            f"two terms are the same: {', '.join(names)}", fix="merge them and add their weights"
        )
    return names


def name_among(terms: Sequence[Term], term: Term) -> str:
    """A term's divergence, plus whatever distinguishes it from others of the same divergence."""
    like = [other for other in terms if other.divergence == term.divergence]
    name = term.divergence
    if len({other.temperature for other in like}) > 1:
        name += f"@T{term.temperature:g}"
    for parameter, value in term.parameters.items():
        if len({other.parameters[parameter] for other in like}) > 1:
            name += f"@{parameter}{value:g}"
    return name


@dataclass(frozen=True)
class Schedule:
    """A factor that moves from `start` to `end` during part of the training.

    It is `start` before `begin` and `end` after `finish`, which are fractions of all steps.
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0
    shape: ScheduleShape = "linear"

    def __post_init__(self) -> None:
        if min(self.start, self.end) < 0:
            raise SignalError(
                f"a schedule from {self.start} to {self.end} makes a weight negative",
                fix="use a start and an end of zero or more",
            )
        if not 0 <= self.begin < self.finish <= 1:
            raise SignalError(
                f"a schedule cannot run from {self.begin} to {self.finish} of all steps",
                fix="use 0 <= begin < finish <= 1",
            )
        if self.shape not in get_args(ScheduleShape):
            raise SignalError(f"unknown schedule shape {self.shape!r}", fix="use linear or cosine")

    def at(self, progress: float) -> float:
        """The factor after the fraction `progress` in [0, 1] of all steps."""
        share = min(1.0, max(0.0, (progress - self.begin) / (self.finish - self.begin)))
        if self.shape == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Mixture:
    """Terms, each with an optional schedule for its weight. All terms share one pass."""

    terms: tuple[tuple[Term, Schedule | None], ...]

    @classmethod
    def of(cls, *terms: Term) -> Mixture:
        """Terms with constant weights."""
        return cls(tuple((term, None) for term in terms))

    def at(self, progress: float) -> tuple[Term, ...]:
        """The terms with their weights after the fraction `progress` in [0, 1] of all steps.

        A term with weight 0 is kept, so that its value is still measured.
        """
        return tuple(
            term if schedule is None else replace(term, weight=term.weight * schedule.at(progress))
            for term, schedule in self.terms
        )


class Tally:
    """Running sums of terms over steps, kept on the device; only `read` synchronizes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows = 0

    def add(self, losses: LossSum | Sequence[LossSum]) -> None:
        """Add one step's losses. If there are several, they are over the same rows."""
        of_step = [losses] if isinstance(losses, LossSum) else list(losses)
        for loss in of_step:
            for name, value in loss.terms.items():
                before = self._sums.get(name)
                wide = value.detach().double()
                self._sums[name] = wide if before is None else before + wide
        self._rows += max((loss.rows for loss in of_step), default=0)

    def means(self, rows: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return each term's mean over `rows` rows since the last reading; reset the sums.

        reduce: sums a tensor over all processes, each of which must call this method. The result
        is empty if there are no rows or no terms.
        """
        sums, self._sums, self._rows = self._sums, {}, 0
        if not sums:
            return {}
        means = (reduce(torch.stack(list(sums.values()))) / max(rows, 1)).tolist()
        return dict(zip(sums, means, strict=True)) if rows else {}

    def read(self) -> dict[str, float]:
        """Return each term's mean per row since the last reading; reset the sums."""
        return self.means(self._rows, lambda sums: sums)
