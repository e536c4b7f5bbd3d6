"""Curves out of the rows of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A measure of training against tokens, in nats a token, with held-out measurements.

    same_measure: the held-out values are of the same measure as the training values.
    """

    name: str
    tokens: list[float]
    values: list[float]
    smoothed: list[float]
    heldout_tokens: list[float]
    heldout: list[float]
    same_measure: bool


def training_curve(history: Sequence[Row], temperature: float = 1.0) -> Curve | None:
    """Forward KL against tokens, or the loss where the objective has no KL; None below two rows.

    temperature: of the objective's KL; held-out KL is always at temperature 1.
    """
    key, name = "forward_kl", "KL to the teacher"
    if temperature != 1.0:
        name += f" at temperature {temperature:g}"
    tokens, values = series(history, key)
    if len(values) < 2:
        key, name = "loss", "Loss"
        tokens, values = series(history, key)
    if len(values) < 2:
        return None
    heldout = [row for row in history if _finite(row, "heldout_kl") and _finite(row, "step")]
    return Curve(
        name=name,
        tokens=tokens,
        values=values,
        smoothed=smooth(values),
        heldout_tokens=[_tokens_at(history, float(row["step"])) for row in heldout],
        heldout=[float(row["heldout_kl"]) for row in heldout],
        same_measure=key == "forward_kl" and temperature == 1.0,
    )


def series(history: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Tokens and finite values of `key`, over the training rows that have both."""
    rows = [row for row in history if _finite(row, key) and _finite(row, "tokens")]
    return [float(row["tokens"]) for row in rows], [float(row[key]) for row in rows]


def median(history: Sequence[Row], key: str) -> float | None:
    values = sorted(float(row[key]) for row in history if _finite(row, key))
    return values[len(values) // 2] if values else None


def smooth(values: Sequence[float]) -> list[float]:
    """Centered mean over a twelfth of the run; at the start only as wide as both sides allow.

    The start stays narrow because the measure falls fastest there; the last values are means over
    the half window that exists, so that one step's noise is not taken for the result.
    """
    reach = max(1, len(values) // 24)
    means = []
    for index in range(len(values)):
        near = min(reach, index)
        window = values[index - near : index + (near if index < reach else reach) + 1]
        means.append(sum(window) / len(window))
    return means


def _tokens_at(history: Sequence[Row], step: float) -> float:
    """Training tokens after `step` steps, by straight lines between the rows that say so."""
    said = [row for row in history if _finite(row, "step") and _finite(row, "tokens")]
    known = sorted([(0.0, 0.0), *((float(row["step"]), float(row["tokens"])) for row in said)])
    for (step_a, tokens_a), (step_b, tokens_b) in pairwise(known):
        if step_a <= step <= step_b:
            share = (step - step_a) / (step_b - step_a) if step_b > step_a else 1.0
            return tokens_a + share * (tokens_b - tokens_a)
    return known[-1][1]


def _finite(row: Row, key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and math.isfinite(value)
