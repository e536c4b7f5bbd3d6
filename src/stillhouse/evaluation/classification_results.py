"""Results of a classifier's evaluation, as plain data that is saved as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

from stillhouse.evaluation.results import Saved

BINS = 15


@dataclass(frozen=True)
class ClassifierResult:
    """One model's results on the test texts. Metrics that need true labels are None without them.

    kl: KL(teacher ‖ model) in nats.
    ece: expected calibration error of the top-1 label, with `BINS` bins of equal width (Guo et al.
        2017, arXiv 1706.04599).
    ece_teacher: the same with the teacher's labels as true labels.
    brier: squared distance to the true label, from 0 to 2.
    confusion: counts by [true][predicted], or by [teacher's][predicted] without true labels.
    """

    role: str
    agreement: float
    kl: float
    ece_teacher: float
    confusion: list[list[int]]
    accuracy: float | None = None
    macro_f1: float | None = None
    ece: float | None = None
    brier: float | None = None
    parameters: int | None = None
    bytes_on_disk: int | None = None
    texts_per_s: float | None = None


@dataclass(frozen=True)
class Abstention:
    """The confidence threshold below which the student abstains.

    wanted: the value that `measure` should reach on the answered texts.
    sureness: the confidence level at which the calibration texts show that it does.
    threshold: the lowest confidence at which the student answers; None if none is high enough.
    coverage: the fraction of the calibration texts that the student answers.
    reached: the measure on these texts.
    test_coverage, test_reached: the same on the test texts, which the threshold was not chosen on.
    """

    measure: str
    wanted: float
    sureness: float
    threshold: float | None
    coverage: float
    reached: float | None
    test_coverage: float
    test_reached: float | None


@dataclass(frozen=True)
class ClassificationEvaluation(Saved):
    labels: list[str]
    texts: int
    results: list[ClassifierResult]
    abstention: Abstention
    curve: list[tuple[float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, role: str) -> ClassifierResult | None:
        return next((result for result in self.results if result.role == role), None)

    @property
    def has_gold(self) -> bool:
        return self.results[0].accuracy is not None
