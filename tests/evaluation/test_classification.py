"""Each metric agrees with its definition, calculated by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillhouse.evaluation.classification import (
    answered,
    calibration_error,
    choose_threshold,
    confusion,
    coverage_curve,
    macro_f1,
    measure,
)
from stillhouse.evaluation.classification_results import Abstention, ClassificationEvaluation

P_NC = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.45, 0.55]])
TRUE_N = torch.tensor([0, 1, 1, 1])


def test_confusion_has_the_true_label_in_the_row() -> None:
    assert confusion(TRUE_N, P_NC.argmax(-1), 2).tolist() == [[1, 0], [1, 2]]


def test_macro_f1_is_the_mean_of_both_labels() -> None:
    first, second = 2 * 1 / (2 * 1 + 1), 2 * 2 / (2 * 2 + 1)
    assert macro_f1(torch.tensor([[1, 0], [1, 2]])) == pytest.approx((first + second) / 2)


def test_a_label_that_never_occurs_does_not_count() -> None:
    assert macro_f1(torch.tensor([[2, 0, 0], [0, 3, 0], [0, 0, 0]])) == 1.0


def test_calibration_error_is_the_gap_between_confidence_and_truth() -> None:
    # Each of the four confidences is alone in its bin.
    gaps = [abs(0.9 - 1), abs(0.6 - 0), abs(0.7 - 1), abs(0.55 - 1)]
    assert calibration_error(P_NC, TRUE_N) == pytest.approx(sum(gaps) / 4, abs=1e-6)


def test_measure_compares_with_both_the_truth_and_the_teacher() -> None:
    teacher_NC = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.5, 0.5], [0.1, 0.9]])
    found = measure("student", P_NC, teacher_NC, TRUE_N)
    assert found.accuracy == 0.75
    assert found.agreement == 0.5  # the teacher's tie goes to the first label
    expected = (teacher_NC * (teacher_NC.log() - P_NC.log())).sum(-1).mean()
    assert found.kl == pytest.approx(float(expected))
    assert found.brier == pytest.approx((0.02 + 0.72 + 0.18 + 0.405) / 4)
    assert measure("teacher", P_NC, P_NC, None).accuracy is None


def test_a_text_without_a_label_from_the_teacher_is_wrong_and_excluded_from_agreement() -> None:
    nan = float("nan")
    teacher_NC = torch.tensor([[0.8, 0.2], [nan, nan], [0.2, 0.8], [0.1, 0.9]])
    teacher = measure("teacher", teacher_NC, teacher_NC, TRUE_N)
    assert (teacher.agreement, teacher.kl) == (1.0, 0.0)
    assert teacher.accuracy == 3 / 4
    # The second text has the second label, which is not predicted.
    assert teacher.macro_f1 == pytest.approx((1 + 2 * 2 / (2 + 3)) / 2)
    assert teacher.confusion == [[1, 0], [0, 2]]
    student = measure("student", P_NC, teacher_NC, TRUE_N)
    assert (student.agreement, student.accuracy) == (1.0, 3 / 4)
    assert student.ece == pytest.approx(calibration_error(P_NC, TRUE_N))


def calibration(wrong: list[int]) -> tuple[Tensor, Tensor]:
    """Texts in order of decreasing confidence; predictions at the given indices are wrong."""
    confidence_N = torch.linspace(0.99, 0.6, 60)
    true_N = torch.zeros(60, dtype=torch.long)
    true_N[wrong] = 1
    return torch.stack([confidence_N, 1 - confidence_N], 1), true_N


def clopper_pearson(right: int, total: int, confidence: float) -> float:
    """The lower bound: `right` or more of `total` have a probability of 1 - confidence there."""
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        tail = sum(
            math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(right, total + 1)
        )
        low, high = (p, high) if tail < 1 - confidence else (low, p)
    return low


@pytest.mark.parametrize("wrong", [[], [30], [10, 50], [40, 45, 50, 55]])
def test_the_threshold_is_the_lowest_whose_lower_bound_reaches_the_target(wrong: list[int]) -> None:
    p_NC, true_N = calibration(wrong)
    # Ten thresholds are tried: confidence in all of them is 0.8 if it is 0.98 in each.
    good = [
        total
        for total in range(6, 61, 6)
        if clopper_pearson(total - sum(w < total for w in wrong), total, 0.98) >= 0.85
    ]
    chosen = choose_threshold(p_NC, true_N, 0.85, 0.8)
    assert chosen == (pytest.approx(float(p_NC[max(good) - 1, 0])) if good else None)


def test_too_few_texts_pass_no_threshold() -> None:
    # If all n are right, the bound is 0.01 ** (1 / n), which reaches 0.9 at n = 44.
    p_NC, true_N = calibration([])
    assert choose_threshold(p_NC[:43], true_N[:43], 0.9, 0.9) is None
    assert choose_threshold(p_NC[:44], true_N[:44], 0.9, 0.9) == pytest.approx(float(p_NC[43, 0]))


def test_a_chosen_threshold_holds_on_texts_like_those_it_was_chosen_on() -> None:
    """If 88% are right at any confidence, every threshold for 90% is wrong. At a confidence level
    of 0.9, one is chosen at most about once in ten times."""
    chance = torch.Generator().manual_seed(0)
    chosen = 0
    for _ in range(200):
        confidence_N = 0.5 + torch.rand(300, generator=chance) / 2
        wrong_N = torch.rand(300, generator=chance) > 0.88
        p_NC = torch.stack([confidence_N, 1 - confidence_N], 1)
        chosen += choose_threshold(p_NC, wrong_N.long(), 0.9, 0.9) is not None
    assert chosen <= 20


def test_answered_is_the_share_above_the_threshold_and_how_good_it_is() -> None:
    assert answered(P_NC, TRUE_N, 0.7) == (0.5, 1.0)
    assert answered(P_NC, TRUE_N, None) == (0.0, None)


def test_the_curve_goes_from_the_most_confident_to_all() -> None:
    shares, right = zip(*coverage_curve(P_NC, TRUE_N), strict=True)
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert right == pytest.approx([1.0, 1.0, 2 / 3, 0.75])


def test_an_evaluation_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    result = measure("teacher", P_NC, P_NC, TRUE_N)
    chosen = Abstention("agreement", 0.9, 0.95, 0.7, 0.5, 1.0, 0.4, None)
    found = ClassificationEvaluation(["a", "b"], 4, [result], chosen, [(0.5, 1.0)], ["a note"])
    found.save(tmp_path / "evaluation.json")
    assert ClassificationEvaluation.load(tmp_path / "evaluation.json") == found
