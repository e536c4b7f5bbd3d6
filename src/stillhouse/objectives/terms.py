"""What a loss is asked for, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stillhouse.errors import SignalError

DIVERGENCES = ("forward_kl", "cross_entropy")
"""forward_kl: KL(teacher ‖ student). cross_entropy: −log q(target)."""


@dataclass(frozen=True)
class Term:
    """One summand of the loss: `weight · divergence(teacher, student)` at a temperature.

    The temperature T divides both models' logits. With `t_squared` (Hinton et al. 2015,
    arXiv 1503.02531, section 2.1) the divergence is multiplied by T², so that its gradient
    keeps its size as T grows. Cross-entropy with the data's own tokens is always at T = 1.

    Raises:
        SignalError: an unknown divergence, a negative weight, a temperature that is not positive.
    """

    divergence: str
    weight: float = 1.0
    temperature: float = 1.0
    t_squared: bool = True

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise SignalError(
                f"there is no divergence {self.divergence!r}",
                fix=f"use one of {', '.join(DIVERGENCES)}",
            )
        if not self.weight >= 0:
            raise SignalError(f"the weight of {self.divergence} is {self.weight}: it is negative")
        if not self.temperature > 0:
            raise SignalError(
                f"the temperature of {self.divergence} is {self.temperature}: it must be positive"
            )
        if self.divergence == "cross_entropy" and self.temperature != 1.0:
            raise SignalError(
                "cross_entropy is defined at temperature 1 only",
                fix="leave its temperature at 1",
            )

    @property
    def factor(self) -> float:
        """What the divergence is multiplied by before its weight: T², or 1."""
        return self.temperature**2 if self.t_squared else 1.0


@dataclass(frozen=True)
class LossSum:
    """A loss summed over rows; divide once, by the global number of supervised rows.

    total: differentiable scalar, `scale · Σ_terms weight · term`.
    terms: each term's own sum over rows (with row weights and T², without its weight and
        without `scale`), detached, still on the device. A divergence that is asked for at two
        temperatures is named "forward_kl@T2".
    rows: supervised rows summed.
    """

    total: Tensor
    terms: dict[str, Tensor]
    rows: int


def term_names(terms: tuple[Term, ...]) -> list[str]:
    """A unique name for each term: its divergence, with the temperature where needed."""
    kinds = [term.divergence for term in terms]
    names = [
        term.divergence
        if kinds.count(term.divergence) == 1
        else f"{term.divergence}@T{term.temperature:g}"
        for term in terms
    ]
    if len(set(names)) < len(names):
        raise SignalError(
            f"two terms are the same: {', '.join(names)}", fix="add their weights into one term"
        )
    return names
