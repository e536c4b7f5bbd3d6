"""Rows of metrics.jsonl become curves; unusable values are left out."""

from __future__ import annotations

import math

import pytest

from stillhouse.report.history import median, smooth, training_charts


def test_held_out_points_are_drawn_at_the_tokens_of_their_step() -> None:
    chart = training_charts(
        [
            {"step": 0, "heldout_kl": 3.0},
            {"step": 10, "tokens": 1000, "loss": 2.0, "forward_kl": 2.0},
            {"step": 15, "heldout_kl": 2.0},
            {"step": 20, "tokens": 3000, "loss": 1.0, "forward_kl": 1.0},
            {"step": 20, "heldout_kl": 1.5},
            {"step": 99, "heldout_kl": 1.4},
        ],
        "token",
    )[0]
    heldout = chart.lines[-1]
    assert chart.x_label == "training tokens (thousands)"
    assert heldout.x == [0, 2, 3, 3]
    assert heldout.y == [3.0, 2.0, 1.5, 1.4]


def test_the_loss_is_plotted_if_there_is_no_kl() -> None:
    rows: list[dict[str, float]] = [{"step": s, "tokens": s, "loss": 2.0} for s in (1, 2)]
    [chart] = training_charts([*rows, {"step": 2, "heldout_kl": 1.0}], "token")
    assert chart.y_label == "Loss (nats/token)"
    assert chart.lines[-1].label == "held-out KL"


def test_training_without_token_counts_is_drawn_against_steps() -> None:
    [chart] = training_charts([{"step": s, "loss": 2.0} for s in (1, 2)], "text")
    assert (chart.x_label, chart.y_label) == ("optimizer steps", "Loss (nats/text)")


def test_kl_at_a_temperature_is_distinguished_from_held_out_kl() -> None:
    rows = [{"step": s, "tokens": s, "loss": 2.0, "forward_kl": 2.0} for s in (1, 2)]
    rows.append({"step": 2, "heldout_kl": 1.0})
    [chart] = training_charts(rows, "token", temperature=2.0)
    assert chart.title == "KL to the teacher at temperature 2"
    assert chart.lines[-1].label == "held-out KL"


def test_values_that_are_not_finite_are_left_out() -> None:
    rows = [{"step": s, "tokens": s, "loss": v} for s, v in enumerate([1.0, math.nan, 3.0, None])]
    [chart] = training_charts(rows, "token")
    assert chart.lines[0].y == [1.0, 3.0]
    assert training_charts(rows[:2], "token") == []
    assert training_charts([], "token") == []


def test_smoothing_keeps_a_straight_line_and_removes_noise() -> None:
    line = [float(value) for value in range(100)]
    assert smooth(line)[:90] == pytest.approx(line[:90])
    assert smooth([7.0]) == [7.0]
    noisy = [1.0 if index % 2 else -1.0 for index in range(100)]
    assert max(map(abs, smooth(noisy)[10:])) <= 0.2


def test_the_median_ignores_rows_without_a_value() -> None:
    assert median([{"x": 3.0}, {"x": 1.0}, {}, {"x": 2.0}], "x") == 2.0
    assert median([], "x") is None
