"""Quality of a classifier, compared with the true labels and with its teacher.

Shapes: N texts, C labels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stillhouse.evaluation.classification_results import BINS, ClassifierResult


def measure(role: str, p_NC: Tensor, teacher_NC: Tensor, gold_N: Tensor | None) -> ClassifierResult:
    """Compute all metrics of one model.

    p_NC, teacher_NC: probabilities; a row is NaN if the model did not name a label.
    gold_N: indices of the true labels, negative if unknown.

    Agreement, KL, and `ece_teacher` cover the texts that both models labeled. Accuracy and
    macro-F1 cover all texts with a true label; a text that the model did not label counts as wrong.
    Calibration error and Brier score cover those that it labeled.
    """
    answered_N, labeled_N = ~p_NC.isnan().any(-1), ~teacher_NC.isnan().any(-1)
    both_N = answered_N & labeled_N
    q_NC, choice_N = teacher_NC[both_N], teacher_NC.argmax(-1)
    floor = torch.finfo(torch.float32).tiny
    log_ratio_NC = q_NC.clamp_min(floor).log() - p_NC[both_N].clamp_min(floor).log()
    predicted_N = p_NC.argmax(-1)
    result: dict[str, Any] = {
        "role": role,
        "agreement": float((predicted_N == choice_N)[both_N].float().mean()),
        "kl": max(0.0, float((q_NC * log_ratio_NC).sum(-1).mean())),
        "ece_teacher": calibration_error(p_NC[both_N], choice_N[both_N]),
    }
    reference_N = choice_N if gold_N is None else gold_N
    known_N = labeled_N if gold_N is None else gold_N >= 0
    shown_N = known_N & answered_N
    confusion_CC = confusion(reference_N[shown_N], predicted_N[shown_N], p_NC.shape[1])
    if gold_N is not None:
        truth_NC = torch.nn.functional.one_hot(reference_N[shown_N], p_NC.shape[1])
        right_N = (predicted_N == reference_N) & answered_N
        missed_C = reference_N[known_N & ~answered_N].bincount(minlength=p_NC.shape[1])
        result |= {
            "accuracy": float(right_N[known_N].float().mean()),
            "macro_f1": macro_f1(confusion_CC, missed_C),
            "ece": calibration_error(p_NC[shown_N], reference_N[shown_N]),
            "brier": float((p_NC[shown_N] - truth_NC).square().sum(-1).mean()),
        }
    return ClassifierResult(**result, confusion=confusion_CC.tolist())


def confusion(true_N: Tensor, predicted_N: Tensor, labels: int) -> Tensor:
    """Confusion matrix [C, C] of counts: true labels in rows, predicted labels in columns."""
    return torch.bincount(true_N * labels + predicted_N, minlength=labels * labels).reshape(
        labels, -1
    )


def macro_f1(confusion_CC: Tensor, missed_C: Tensor | int = 0) -> float:
    """The mean F1 over labels that occur, as true or predicted labels.

    missed_C: for each true label, the number of texts for which no label was predicted.
    """
    right_C = confusion_CC.diagonal().double()
    total_C = confusion_CC.sum(0) + confusion_CC.sum(1) + missed_C
    return float((2 * right_C / total_C)[total_C > 0].mean())


def calibration_error(p_NC: Tensor, true_N: Tensor) -> float:
    """Expected calibration error: |confidence - accuracy| of each text's bin, averaged over
    texts."""
    confidence_N, predicted_N = p_NC.max(-1)
    right_N = (predicted_N == true_N).double()
    bins_N = (confidence_N * BINS).long().clamp_max(BINS - 1)
    error = 0.0
    for bin_ in bins_N.unique():
        inside_N = bins_N == bin_
        gap = (confidence_N[inside_N].double().mean() - right_N[inside_N].mean()).abs()
        error += float(gap) * float(inside_N.double().mean())
    return error


def coverage_curve(p_NC: Tensor, true_N: Tensor) -> list[tuple[float, float]]:
    """(coverage, accuracy on the answered texts) pairs, as more and more texts are answered, the
    most confident first."""
    confidence_N, predicted_N = p_NC.max(-1)
    order_N = confidence_N.argsort(descending=True, stable=True)
    right_N = (predicted_N == true_N)[order_N].double()
    counts_N = torch.arange(1, len(right_N) + 1)
    shares_N, right_share_N = counts_N / len(right_N), right_N.cumsum(0) / counts_N
    return list(zip(shares_N.tolist(), right_share_N.tolist(), strict=True))


SHARES = 10
"""Number of thresholds to try: those at which 1/10, 2/10, ... of the texts are answered."""


def choose_threshold(p_NC: Tensor, true_N: Tensor, target: float, level: float) -> float | None:
    """The lowest of `SHARES` thresholds above which the fraction of correct answers is at least
    `target`; None if there is no such threshold.

    The lower Clopper-Pearson bound of the fraction must reach `target`. Since several thresholds
    are tried, each bound is computed at the confidence level 1 - (1 - level) / SHARES (Bonferroni).
    """
    confidence_N, predicted_N = p_NC.max(-1)
    wrong_N = predicted_N != true_N
    falling_N = confidence_N.sort(descending=True).values
    for share in range(SHARES, 0, -1):
        threshold = falling_N[math.ceil(share * len(falling_N) / SHARES) - 1]
        above_N = confidence_N >= threshold
        wrong, total = int(wrong_N[above_N].sum()), int(above_N.sum())
        if _chance_of_so_few(wrong, total, 1 - target) <= (1 - level) / SHARES:
            return float(threshold)
    return None


def _chance_of_so_few(wrong: int, total: int, rate: float) -> float:
    """P(at most `wrong` errors in `total`) if each is an error with probability `rate`.

    The lower Clopper-Pearson bound of the accuracy at confidence level s is 1 - rate, with the
    rate for which this probability is 1 - s.
    """
    n = torch.tensor(float(total), dtype=torch.float64)
    i = torch.arange(wrong + 1, dtype=torch.float64)
    ways = (n + 1).lgamma() - (i + 1).lgamma() - (n - i + 1).lgamma()
    terms = ways + i * math.log(rate) + (n - i) * math.log1p(-rate)
    return float(terms.logsumexp(0).exp())


def answered(p_NC: Tensor, true_N: Tensor, threshold: float | None) -> tuple[float, float | None]:
    """The fraction of texts at or above the threshold, and the accuracy on these texts."""
    confidence_N, predicted_N = p_NC.max(-1)
    above_N = confidence_N >= (math.inf if threshold is None else threshold)
    if not bool(above_N.any()):
        return 0.0, None
    right = float((predicted_N == true_N)[above_N].double().mean())
    return float(above_N.double().mean()), right
