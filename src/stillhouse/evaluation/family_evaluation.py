"""The evaluation of a family of students, as plain data that is written to JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stillhouse.evaluation.results import Generation, ModelResult, Saved

FAMILY_FILE = "family.json"
"""The evaluation of a family, in its run folder."""


@dataclass(frozen=True)
class Member:
    """One student of a family.

    untrained: as pruned. shape: sizes before and after, for the axes that were cut. report: its
    page. tokens, flops, seconds: of the work only for this member. decoding: its speed as a
    multiple of the teacher's in the same run, if it was measured. quantized: the exported model, if
    it is quantized.
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
        """The fraction of the pruning's KL that training recovered."""
        before, after = self.untrained.fidelity.kl, self.student.fidelity.kl
        return 1.0 - after / before if before > 0 else 0.0


@dataclass(frozen=True)
class CutTeacher:
    """A teacher whose vocabulary was cut: before and after. perplexity: on training text without
    any of the removed tokens; None if there was no such text."""

    tokens: tuple[int, int]
    parameters: tuple[int, int]
    perplexity: tuple[float, float] | None


@dataclass(frozen=True)
class ScratchTraining:
    """The largest member's shape, trained from random weights under the same teacher.

    points: measured (training tokens, held-out KL), tokens ascending. flops, seconds: of that
    training.
    """

    points: list[tuple[int, float]]
    flops: int
    seconds: float

    def kl_at(self, tokens: int) -> float | None:
        """KL after a number of tokens, by linear interpolation; None outside the measurements."""
        for (before, kl_before), (after, kl_after) in pairwise(self.points):
            if before <= tokens <= after:
                return kl_before + (kl_after - kl_before) * (tokens - before) / (after - before)
        return None


@dataclass(frozen=True)
class FamilyEvaluation(Saved):
    """members: the largest first. chained: each was pruned from the one before it. learned_from:
    as cascade.teacher. watts: assumed power of the machine, for the energy. cut: set if the
    teacher, whose measurements are given, had its vocabulary cut itself."""

    teacher: ModelResult
    members: Sequence[Member]
    chained: bool
    generations: Sequence[Generation] = ()
    learned_from: str = "original"
    scratch: ScratchTraining | None = None
    watts: float = 0.0
    cut: CutTeacher | None = None
