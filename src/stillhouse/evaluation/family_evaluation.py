"""Results of a family's evaluation, as plain data that is saved as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stillhouse.evaluation.results import Generation, ModelResult, Saved

FAMILY_FILE = "family.json"
"""File with a family's evaluation, in its run folder."""


@dataclass(frozen=True)
class Member:
    """One student of a family.

    untrained: the student after pruning.
    shape: sizes before and after, for the axes that were cut.
    report: path of its report.
    tokens, flops, seconds: of the work for this member alone.
    decoding: decoding speed as a multiple of the teacher's in the same run; None if not measured.
    quantized: the exported model, if it is quantized.
    """

    name: str
    untrained: ModelResult
    student: ModelResult
    shape: dict[str, tuple[int, int]]
    report: str
    tokens: int
    flops: int
    seconds: float
    decoding: float | None = None
    quantized: ModelResult | None = None

    @property
    def recovered(self) -> float:
        """The fraction of the KL after pruning that training removed."""
        before, after = self.untrained.fidelity.kl, self.student.fidelity.kl
        return 1.0 - after / before if before > 0 else 0.0


@dataclass(frozen=True)
class CutTeacher:
    """A teacher whose vocabulary was cut; each pair is before and after.

    perplexity: on training text without any of the removed tokens; None if there is no such text.
    """

    tokens: tuple[int, int]
    parameters: tuple[int, int]
    perplexity: tuple[float, float] | None


@dataclass(frozen=True)
class ScratchTraining:
    """A model with the largest member's shape, distilled from random weights by the same teacher.

    points: (training tokens, held-out KL) pairs, by ascending tokens.
    flops, seconds: of this training.
    """

    points: list[tuple[int, float]]
    flops: int
    seconds: float

    def kl_at(self, tokens: int) -> float | None:
        """KL after this many tokens, interpolated linearly; None outside the measured range."""
        for (before, kl_before), (after, kl_after) in pairwise(self.points):
            if before <= tokens <= after:
                return kl_before + (kl_after - kl_before) * (tokens - before) / (after - before)
        return None


@dataclass(frozen=True)
class FamilyEvaluation(Saved):
    """The evaluation of a family.

    teacher: the teacher's measurements; if its vocabulary was cut, after the cut.
    members: the largest first.
    chained: whether each member was pruned from the one before it.
    learned_from: the value of cascade.teacher.
    watts: the machine's assumed power, to estimate energy.
    cut: set if the teacher's vocabulary was cut.
    """

    teacher: ModelResult
    members: Sequence[Member]
    chained: bool
    generations: Sequence[Generation] = ()
    learned_from: str = "original"
    scratch: ScratchTraining | None = None
    watts: float = 0.0
    cut: CutTeacher | None = None
