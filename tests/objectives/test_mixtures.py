"""Term weights that change during training, and the tally of their values for logging."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillhouse.errors import SignalError
from stillhouse.objectives import Mixture, Schedule, Tally, Term, fused_loss
from stillhouse.signals import DenseSignal
from tests.objectives.cases import make_case


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(1.0, 0.0), [1.0, 0.75, 0.5, 0.0]),
        (Schedule(0.0, 2.0, shape="cosine"), [0.0, 2 * (1 - 2**-0.5) / 2, 1.0, 2.0]),
        (Schedule(1.0, 0.0, begin=0.25, finish=0.75), [1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_a_schedule_interpolates_and_is_constant_outside_its_range(
    schedule: Schedule, expected: list[float]
) -> None:
    assert [schedule.at(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected)
    assert schedule.at(-1) == schedule.at(0)
    assert schedule.at(2) == schedule.at(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1.0, "end": 0.0}, "negative"),
        ({"start": 1.0, "end": 0.0, "begin": 0.5, "finish": 0.5}, "from 0.5 to 0.5"),
        ({"start": 1.0, "end": 0.0, "shape": "square"}, "shape 'square'"),
    ],
)
def test_an_invalid_schedule_is_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SignalError, match=message):
        Schedule(**arguments)


def test_a_mixture_scales_each_weight_and_keeps_terms_of_weight_zero() -> None:
    mixture = Mixture(
        ((Term("forward_kl", 2.0), Schedule(1.0, 0.0)), (Term("cross_entropy", 0.5), None))
    )
    assert [term.weight for term in mixture.at(0.25)] == [1.5, 0.5]
    assert [term.weight for term in mixture.at(1.0)] == [0.0, 0.5]
    assert Mixture.of(Term("jsd")).at(0.7) == (Term("jsd"),)


def test_a_term_of_weight_zero_is_measured_and_has_no_gradient() -> None:
    case = make_case()
    arguments: dict[str, Any] = {"signal": case.signal, "targets_N": case.targets_N}
    for other in ("forward_kl", "jsd"):
        terms = [Term(other, 0.0), Term("cross_entropy")]
        both = fused_loss(case.hidden_ND, case.head, terms, **arguments)
        alone = fused_loss(case.hidden_ND, case.head, terms[1:], **arguments)
        assert both.terms[other] > 0
        torch.testing.assert_close(
            torch.autograd.grad(both.total, case.leaves),
            torch.autograd.grad(alone.total, case.leaves),
        )


def test_a_tally_gives_token_means_over_steps_of_any_size_and_then_is_empty() -> None:
    whole, tally = make_case(rows=7), Tally()
    assert isinstance(whole.signal, DenseSignal)
    assert tally.read() == {}
    for rows in (slice(0, 1), slice(1, 7)):
        part = DenseSignal(whole.signal.hidden_ND[rows], whole.signal.head)
        tally.add(fused_loss(whole.hidden_ND[rows], whole.head, [Term("jsd")], signal=part))
    expected = fused_loss(whole.hidden_ND, whole.head, [Term("jsd")], signal=whole.signal)
    assert tally.read()["jsd"] == pytest.approx(expected.terms["jsd"].item() / 7)
    assert tally.read() == {}


def test_a_tally_counts_the_rows_of_a_step_once_for_several_losses() -> None:
    case, tally = make_case(rows=4), Tally()
    losses = [
        fused_loss(case.hidden_ND, case.head, [Term(kind)], signal=case.signal)
        for kind in ("jsd", "forward_kl")
    ]
    tally.add(losses)
    means = tally.read()
    assert means["jsd"] == pytest.approx(losses[0].terms["jsd"].item() / 4)
    assert means["forward_kl"] == pytest.approx(losses[1].terms["forward_kl"].item() / 4)
