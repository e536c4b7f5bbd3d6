"""Measurements of own text during training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillhouse.generation.own_text import score_rows
from stillhouse.signals import DenseSignal, LMHead, LogitsSignal
from stillhouse.training import own_measures
from stillhouse.training.own_measures import far_from_data, measure_rows
from tests.training.conftest import Setting
from tests.training.test_on_policy import run

pytestmark = pytest.mark.run

V, D = 11, 4


def random_rows(rows: int) -> tuple[Any, ...]:
    torch.manual_seed(rows)
    student, teacher = LMHead(torch.randn(V, D)), LMHead(torch.randn(V + 3, D))
    signal = DenseSignal(torch.randn(rows, D), teacher)
    return torch.randn(rows, D), student, signal, torch.randint(0, V, (rows,))


@pytest.mark.parametrize("rows", [0, 5, 32, 64])
def test_the_sums_are_those_of_the_chosen_rows(rows: int) -> None:
    hidden_ND, head, signal, targets_N = random_rows(rows)
    found = measure_rows(hidden_ND, head, signal, targets_N, V)
    assert found is not None
    assert (float(found.total), found.rows) == (0.0, rows)
    every = slice(None, None, max(1, rows // own_measures.MEASURED_ROWS))
    scores = score_rows(
        (hidden_ND[every] @ head.weight_VD.T).log_softmax(-1),
        (signal.hidden_ND[every] @ signal.head.weight_VD[:V].T).log_softmax(-1),
        targets_N[every],
    )
    for value, column_N in zip(found.terms.values(), scores.columns, strict=True):
        expected = column_N.mean() * rows if rows else torch.tensor(0.0)
        torch.testing.assert_close(value, expected)


def test_only_full_distributions_are_measured() -> None:
    hidden_ND, head, _, targets_N = random_rows(3)
    signal = LogitsSignal(torch.zeros(3, V))
    assert measure_rows(hidden_ND, head, signal, targets_N, V) is None


def test_every_step_has_them_and_the_loss_is_as_without(
    narrow: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"share": 0.5}
    measured = run(narrow, None, own, max_steps=2).metrics
    monkeypatch.setattr("stillhouse.training.distillation.measure_rows", lambda *_: None)
    plain = run(narrow, None, own, max_steps=2).metrics
    keys = {"own_forward_kl", "own_entropy", "own_teacher_logprob"}
    for one, other in zip(measured, plain, strict=True):
        assert one.keys() - other.keys() == (keys if "loss" in one else set())
        for key in other.keys() & {"loss", "own_reverse_kl", "grad_norm", "own_repetition"}:
            assert one[key] == other[key]


def test_a_student_that_is_far_on_its_own_text_is_reported_once() -> None:
    rows = [{"forward_kl": 0.4}, {"forward_kl": 0.2, "own_forward_kl": 0.5}]
    warning = far_from_data(rows)
    assert warning is not None
    assert "0.5 nats/token, 2.5 times that on data (0.2)" in warning
    assert "cold_start_tokens" in warning
    assert far_from_data([*rows, {"forward_kl": 0.1, "own_forward_kl": 0.5}]) is None
    assert far_from_data([{"heldout_kl": 0.4}, *rows]) is None
    assert far_from_data([{"own_forward_kl": 0.5}]) is None
    assert far_from_data([]) is None


@pytest.mark.parametrize(("far", "reports"), [(1e-9, 1), (1e9, 0)])
def test_a_training_reports_it(
    narrow: Setting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    far: float,
    reports: int,
) -> None:
    monkeypatch.setattr(own_measures, "FAR", far)
    run(narrow, None, {"share": 0.5}, max_steps=3)
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("warning: on its own text") == reports
