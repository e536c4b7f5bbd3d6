"""Metrics of own text that are computed during training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillhouse.generation.own_text import score_rows
from stillhouse.objectives import LossSum
from stillhouse.signals import DenseSignal, LMHead, LogitsSignal
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.teacher import TeacherView
from stillhouse.training.distillation import Distillation
from stillhouse.training.measures import MEASURED_ROWS, measure_rows
from tests import tiny
from tests.training.conftest import Setting
from tests.training.test_on_policy import KL, run

pytestmark = pytest.mark.run

V, D = 11, 4


def random_rows(rows: int) -> tuple[Any, ...]:
    torch.manual_seed(rows)
    student, teacher = LMHead(torch.randn(V, D)), LMHead(torch.randn(V + 3, D))
    signal = DenseSignal(torch.randn(rows, D), teacher)
    return torch.randn(rows, D), student, signal, torch.randint(0, V, (rows,))


@pytest.mark.parametrize("rows", [0, 5, 32, 64])
def test_the_metrics_are_means_over_the_chosen_rows(rows: int) -> None:
    hidden_ND, head, signal, targets_N = random_rows(rows)
    found = measure_rows(hidden_ND, head, signal, targets_N, V)
    assert (float(found.total), found.rows) == (0.0, rows)
    every = slice(None, None, max(1, rows // MEASURED_ROWS))
    scores = score_rows(
        (hidden_ND[every] @ head.weight_VD.T).log_softmax(-1),
        (signal.hidden_ND[every] @ signal.head.weight_VD[:V].T).log_softmax(-1),
        targets_N[every],
    )
    for value, column_N in zip(found.terms.values(), scores, strict=True):
        expected = column_N.mean() * rows if rows else torch.tensor(0.0)
        torch.testing.assert_close(value, expected)


def test_only_complete_distributions_are_measured() -> None:
    """If one of several teachers has another kind of signal, nothing is measured."""
    teacher, student = tiny.llama(5), tiny.llama(6)
    module = Distillation(student, KL)
    ids_RL = torch.arange(40, 60).view(2, 10)
    positions_RL = torch.arange(10).expand(2, -1)
    batch = {"input_ids": ids_RL, "labels": ids_RL, "position_ids": positions_RL}
    dense = LocalTeacher(teacher).answer(batch).signals[0]
    assert isinstance(dense, DenseSignal)
    logits = LogitsSignal(dense.hidden_ND @ dense.head.weight_VD.T)
    measured = {"forward_kl", "reverse_kl", "entropy", "teacher_logprob"}
    for signals, expected in (
        ((dense, dense), measured),
        ((dense, logits), {"forward_kl"}),
        ((logits,), {"forward_kl"}),
    ):
        found = module(batch, TeacherView(signals), measure=True)
        assert found.terms.keys() == expected


def test_every_step_reports_the_metrics_and_the_loss_does_not_change(
    narrow: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"share": 0.5}
    measured = run(narrow, None, own, max_steps=2).metrics
    nothing = LossSum(torch.zeros(()), {}, 0)
    monkeypatch.setattr(Distillation, "_measures", lambda *_: nothing)
    plain = run(narrow, None, own, max_steps=2).metrics
    keys = {"own_forward_kl", "own_entropy", "own_teacher_logprob"}
    for one, other in zip(measured, plain, strict=True):
        assert one.keys() - other.keys() == (keys if "loss" in one else set())
        for key in other.keys() & {"loss", "own_reverse_kl", "grad_norm", "own_repetition"}:
            assert one[key] == other[key]
