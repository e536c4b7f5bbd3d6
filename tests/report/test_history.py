"""Rows of metrics.jsonl become curves; rows that are of no use are left out."""

from __future__ import annotations

import math

import pytest

from stillhouse.report.history import median, smooth, training_curve


def test_held_out_points_stand_at_the_tokens_of_their_step() -> None:
    curve = training_curve(
        [
            {"step": 0, "heldout_kl": 3.0},
            {"step": 10, "tokens": 1000, "loss": 2.0, "forward_kl": 2.0},
            {"step": 15, "heldout_kl": 2.0},
            {"step": 20, "tokens": 3000, "loss": 1.0, "forward_kl": 1.0},
            {"step": 20, "heldout_kl": 1.5},
            {"step": 99, "heldout_kl": 1.4},
        ]
    )
    assert curve is not None
    assert curve.heldout_tokens == [0, 2000, 3000, 3000]
    assert curve.heldout == [3.0, 2.0, 1.5, 1.4]


def test_loss_is_drawn_where_there_is_no_kl() -> None:
    curve = training_curve([{"step": s, "tokens": s, "loss": 2.0} for s in (1, 2)])
    assert curve is not None
    assert curve.name == "Loss"
    assert not curve.same_measure


def test_kl_at_a_temperature_is_not_the_held_out_measure() -> None:
    rows = [{"step": s, "tokens": s, "loss": 2.0, "forward_kl": 2.0} for s in (1, 2)]
    curve = training_curve(rows, temperature=2.0)
    assert curve is not None
    assert curve.name == "KL to the teacher at temperature 2"
    assert not curve.same_measure


def test_values_that_are_not_finite_are_left_out() -> None:
    rows = [{"step": s, "tokens": s, "loss": v} for s, v in enumerate([1.0, math.nan, 3.0, None])]
    curve = training_curve(rows)
    assert curve is not None
    assert curve.values == [1.0, 3.0]
    assert training_curve(rows[:2]) is None
    assert training_curve([]) is None


def test_smoothing_keeps_a_line_and_the_start() -> None:
    line = [float(value) for value in range(100)]
    assert smooth(line)[:90] == pytest.approx(line[:90])
    assert smooth([7.0]) == [7.0]
    noisy = [1.0 if index % 2 else -1.0 for index in range(100)]
    assert max(map(abs, smooth(noisy)[10:])) <= 0.2


def test_median() -> None:
    assert median([{"x": 3.0}, {"x": 1.0}, {}, {"x": 2.0}], "x") == 2.0
    assert median([], "x") is None
