"""Mixtures of terms with scheduled weights, and running sums of their values for logging."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives.objective_names import ScheduleShape
from stillhouse.objectives.terms import LossSum, Term


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

    def take(self) -> tuple[list[str], Tensor]:
        """Return names and sums over rows since the last reading, on the device; reset the sums."""
        names = list(self._sums)
        sums = torch.stack(list(self._sums.values())) if names else torch.empty(0)
        self._sums, self._rows = {}, 0
        return names, sums

    def means(self, rows: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return each term's mean over `rows` rows since the last reading; reset the sums.

        reduce: sums a tensor over all processes, each of which must call this method. The result
        is empty if there are no rows or no terms.
        """
        names, sums = self.take()
        if not names:
            return {}
        means = (reduce(sums) / max(rows, 1)).tolist()
        return dict(zip(names, means, strict=True)) if rows else {}

    def read(self) -> dict[str, float]:
        """Return each term's mean per row since the last reading; reset the sums."""
        rows = self._rows
        names, sums = self.take()
        return dict(zip(names, (sums / rows).tolist(), strict=True)) if rows else {}
