"""Terms of a loss, and the loss's value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives.objective_names import PARAMETERS


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
        given = {name: getattr(self, name) for name in ("alpha", "beta", "mu")}
        for name, value in given.items():
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
