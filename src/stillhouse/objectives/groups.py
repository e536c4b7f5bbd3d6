"""Groups of terms that share a temperature, and so their softmaxes; and scratch buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stillhouse.objectives.terms import Term


@dataclass(frozen=True)
class Member:
    """A term of a group. place: its index among all terms. coefficient: factor of its gradient."""

    place: int
    term: Term
    coefficient: float


@dataclass(frozen=True)
class Group:
    """All terms with the same temperature."""

    temperature: float
    members: tuple[Member, ...]

    @property
    def of_teacher(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.term.needs_teacher)

    @property
    def of_data(self) -> tuple[Member, ...]:
        """Cross-entropy with the data's own tokens."""
        return tuple(member for member in self.members if not member.term.needs_teacher)

    def only(self, divergence: str) -> bool:
        return all(member.term.divergence == divergence for member in self.of_teacher)


def group_by_temperature(terms: Sequence[Term]) -> tuple[list[Group], float]:
    """Return the groups, and the factor taken out of every coefficient.

    A term's gradient with respect to logits has the factor weight · T² / T (or weight / T).
    Dividing these factors by their sum makes the coefficient of a lone term 1, which saves a pass
    over the logits: the sum is folded into the matrix products that follow.
    """
    raw = [term.weight * term.factor * term.gradient_factor / term.temperature for term in terms]
    common = sum(raw) or 1.0
    groups = []
    for temperature in sorted({term.temperature for term in terms}):
        members = (
            Member(place, term, raw[place] / common)
            for place, term in enumerate(terms)
            if term.temperature == temperature
        )
        groups.append(Group(temperature, tuple(members)))
    return groups, common


class Workspace:
    """Named buffers of one shape, allocated on first use and reused for every block."""

    def __init__(self, shape: tuple[int, int], like: Tensor) -> None:
        """shape: shape of the largest block. like: tensor on the device, in the reduction dtype."""
        self.shape = shape
        self.like = like
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int) -> Tensor:
        """A buffer [rows, V] with arbitrary contents."""
        if name not in self._buffers:
            self._buffers[name] = self.like.new_empty(self.shape)
        return self._buffers[name][:rows]

    def wide(self, name: str, values_bV: Tensor) -> Tensor:
        """The values in the reduction dtype, copied only if their dtype differs."""
        if values_bV.dtype == self.like.dtype:
            return values_bV
        return self.buffer(name, len(values_bV)).copy_(values_bV)
