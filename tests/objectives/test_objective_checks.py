"""Invalid inputs raise one error that names the tensor and the row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stillhouse.errors import SignalError
from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import DenseSignal, LMHead
from tests.objectives.cases import make_case

MIXTURE = [Term("forward_kl"), Term("cross_entropy", 0.5)]


def wrong_hidden_rank(a: dict[str, Any]) -> None:
    a["hidden_ND"] = a["hidden_ND"][None]


def wrong_width(a: dict[str, Any]) -> None:
    a["hidden_ND"] = a["hidden_ND"][:, :-1]


def wrong_teacher_rows(a: dict[str, Any]) -> None:
    a["signal"] = DenseSignal(a["signal"].hidden_ND[1:], a["signal"].head)


def wrong_teacher_width(a: dict[str, Any]) -> None:
    a["signal"] = DenseSignal(a["hidden_ND"], a["signal"].head)


def no_teacher(a: dict[str, Any]) -> None:
    a["signal"] = None


def no_targets(a: dict[str, Any]) -> None:
    a["targets_N"] = None


def too_few_targets(a: dict[str, Any]) -> None:
    a["targets_N"] = a["targets_N"][:-1]


def ignored_target(a: dict[str, Any]) -> None:
    a["targets_N"][2] = -100


def target_beyond_vocabulary(a: dict[str, Any]) -> None:
    a["targets_N"][3] = 13


def float_targets(a: dict[str, Any]) -> None:
    a["targets_N"] = a["targets_N"].double()


def nan_hidden(a: dict[str, Any]) -> None:
    a["hidden_ND"] = a["hidden_ND"].detach().clone()
    a["hidden_ND"][4, 1] = float("nan")


def infinite_teacher(a: dict[str, Any]) -> None:
    a["signal"].hidden_ND[5, 0] = float("inf")


def negative_row_weight(a: dict[str, Any]) -> None:
    a["row_weights_N"] = torch.tensor([1.0, 1.0, 1.0, -2.0, 1.0, 1.0])


def too_many_row_weights(a: dict[str, Any]) -> None:
    a["row_weights_N"] = torch.ones(7)


def vocabulary_larger_than_heads(a: dict[str, Any]) -> None:
    a["vocab_size"] = 14


def no_terms(a: dict[str, Any]) -> None:
    a["terms"] = []


def repeated_term(a: dict[str, Any]) -> None:
    a["terms"] = [Term("forward_kl"), Term("forward_kl")]


def misshapen_bias(a: dict[str, Any]) -> None:
    a["head"] = dataclasses.replace(a["head"], bias_V=torch.zeros(12))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_hidden_rank, r"hidden_ND has shape \(1, 6, 5\)"),
        (wrong_width, "hidden_ND has width 4, but its head expects 5"),
        (wrong_teacher_rows, "signal.hidden_ND has 5 rows, but hidden_ND has 6"),
        (wrong_teacher_width, "signal.hidden_ND has width 5, but its head expects 7"),
        (no_teacher, "forward_kl compares the student with a teacher"),
        (no_targets, "cross_entropy needs the data's own tokens"),
        (too_few_targets, "targets_N has 5 rows"),
        (ignored_target, "targets_N contains the id -100 in row 2"),
        (target_beyond_vocabulary, "targets_N contains the id 13 in row 3"),
        (float_targets, "targets_N has dtype torch.float64"),
        (nan_hidden, "hidden_ND is not finite in row 4"),
        (infinite_teacher, "signal.hidden_ND is not finite in row 5"),
        (negative_row_weight, "row_weights_N is negative in row 3: -2.0"),
        (too_many_row_weights, "row_weights_N has 7 rows"),
        (
            vocabulary_larger_than_heads,
            "vocab_size is 14, but it must be between 1 and 13, the number of rows",
        ),
        (no_terms, "the loss has no terms"),
        (repeated_term, "two terms are the same"),
        (misshapen_bias, "the bias of hidden_ND's head"),
    ],
)
def test_an_error_names_the_invalid_input(
    spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    case = make_case()
    arguments: dict[str, Any] = {
        "hidden_ND": case.hidden_ND,
        "head": case.head,
        "terms": MIXTURE,
        "signal": case.signal,
        "targets_N": case.targets_N,
    }
    spoil(arguments)
    with pytest.raises(SignalError, match=message) as caught:
        fused_loss(**arguments)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "forward_lk"}, "unknown divergence 'forward_lk'"),
        ({"divergence": "forward_kl", "weight": -1.0}, "must be finite and not negative"),
        ({"divergence": "forward_kl", "weight": float("nan")}, "must be finite and not negative"),
        ({"divergence": "forward_kl", "temperature": 0.0}, "must be between 0.001 and 1000"),
        ({"divergence": "cross_entropy", "temperature": 2.0}, "only defined at temperature 1"),
        ({"divergence": "reverse_kl", "beta": 0.5}, "reverse_kl has no beta"),
        ({"divergence": "jsd", "beta": 1.5}, r"beta of jsd is 1.5: it must lie in \[0, 1\]"),
        ({"divergence": "alpha_beta", "alpha": 0.0, "beta": 0.0}, "both 0"),
    ],
)
def test_an_invalid_term_is_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SignalError, match=message):
        Term(**arguments)


def test_cross_entropy_needs_no_teacher() -> None:
    case = make_case()
    loss = fused_loss(
        case.hidden_ND,
        LMHead(case.head.weight_VD),
        [Term("cross_entropy")],
        targets_N=case.targets_N,
    )
    expected = torch.nn.functional.cross_entropy(
        case.hidden_ND @ case.head.weight_VD.T, case.targets_N, reduction="sum"
    )
    torch.testing.assert_close(loss.total, expected)
