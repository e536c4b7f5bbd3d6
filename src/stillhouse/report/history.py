"""Training curves from the rows of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from stillhouse import number_format as text
from stillhouse.report.charts import ACCENT, INK, MUTED, Line, LineChart, in_units
from stillhouse.report.page import Section

Rows = Sequence[Mapping[str, Any]]


def training_charts(rows: Rows, unit: str, temperature: float = 1.0) -> list[LineChart]:
    """Chart KL to the teacher, or the loss if the objective has no KL, and the gradient norm.

    The x axis is tokens, or optimizer steps if tokens are not counted. No charts with fewer than
    two rows. unit: what the loss is averaged over. temperature: the temperature of the objective's
    KL; held-out KL is always at temperature 1.
    """
    axis, axis_name = ("tokens", "training tokens")
    if not any(_finite(row, axis) for row in rows):
        axis, axis_name = "step", "optimizer steps"
    key, name = "forward_kl", "KL to the teacher"
    if temperature != 1.0:
        name += f" at temperature {temperature:g}"
    if len(series(rows, key, axis)[1]) < 2:
        key, name = "loss", "Loss"
    x, y = series(rows, key, axis)
    if len(y) < 2:
        return []
    heldout_x, heldout = series_of_windows(rows, "heldout_kl", axis)
    scaled, label = in_units([*x, *heldout_x], axis_name)
    lines = [
        Line(scaled[: len(x)], y, ACCENT, "each step", "faint"),
        Line(scaled[: len(x)], smooth(y), ACCENT, "smoothed"),
    ]
    if heldout:
        same = key == "forward_kl" and temperature == 1.0
        named = "held-out text" if same else "held-out KL"
        lines.append(Line(scaled[len(x) :], heldout, INK, named, "measured"))
    charts = [_chart(name, f"{name} (nats/{unit})", label, lines)]
    x, y = series(rows, "grad_norm", axis)
    if len(y) >= 2:
        x, label = in_units(x, axis_name)
        lines = [Line(x, y, MUTED, style="faint"), Line(x, smooth(y), MUTED)]
        charts.append(_chart("Gradient norm", "gradient norm before clipping", label, lines))
    return charts


def _chart(title: str, y_label: str, x_label: str, lines: list[Line]) -> LineChart:
    return LineChart(title, x_label, y_label, lines, log=True, x_limits=(0, None))


def series(rows: Rows, key: str, axis: str = "tokens") -> tuple[list[float], list[float]]:
    """Return the finite values of `axis` and `key` from the rows that have both."""
    found = [row for row in rows if _finite(row, key) and _finite(row, axis)]
    return [float(row[axis]) for row in found], [float(row[key]) for row in found]


def series_of_windows(
    rows: Rows, key: str, axis: str = "tokens"
) -> tuple[list[float], list[float]]:
    """Like `series`, but include rows without tokens, such as those of a window of own text, placed
    at the tokens of their step."""
    found = [row for row in rows if _finite(row, key) and _finite(row, "step")]
    x = [
        float(row[axis]) if _finite(row, axis) else _at_step(rows, float(row["step"]), axis)
        for row in found
    ]
    return x, [float(row[key]) for row in found]


def median(rows: Rows, key: str) -> float | None:
    values = sorted(float(row[key]) for row in rows if _finite(row, key))
    return values[len(values) // 2] if values else None


def smooth(values: Sequence[float]) -> list[float]:
    """Compute a centered mean over a twelfth of the run.

    At the start, the window is only as wide as fits on both sides, because values change fastest
    there. At the end, it shrinks to the available half, so that one step's noise is not mistaken
    for the result.
    """
    reach = max(1, len(values) // 24)
    means = []
    for index in range(len(values)):
        near = min(reach, index)
        window = values[index - near : index + (near if index < reach else reach) + 1]
        means.append(sum(window) / len(window))
    return means


def _at_step(rows: Rows, step: float, axis: str) -> float:
    """Interpolate the training tokens after `step` steps linearly between the rows that have
    both."""
    both = [row for row in rows if _finite(row, "step") and _finite(row, axis)]
    known = sorted([(0.0, 0.0), *((float(row["step"]), float(row[axis])) for row in both)])
    for (step_a, a), (step_b, b) in pairwise(known):
        if step_a <= step <= step_b:
            share = (step - step_a) / (step_b - step_a) if step_b > step_a else 1.0
            return a + share * (b - a)
    return known[-1][1]


def _finite(row: Mapping[str, Any], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and math.isfinite(value)


# --- the section of a report --------------------------------------------------------------------


def kl_temperature(recipe: Mapping[str, Any]) -> float:
    """The temperature of the objective's KL on the output logits."""
    terms = recipe.get("objective", {}).get("terms", [])
    of_output = (t for t in terms if t.get("divergence") == "forward_kl" and not t.get("layers"))
    return next((float(t["temperature"]) for t in of_output), 1.0)


def training_section(history: Rows, temperature: float = 1.0) -> Section:
    """Build the section with the curves of training on tokens."""
    charts = training_charts(history, "token", temperature)
    facts = _training_facts(history) if charts else []
    return Section("Training", "training", charts=[*charts], facts=facts)


def _training_facts(history: Rows) -> list[tuple[str, str]]:
    steps, tokens = series(history, "tokens", "step")
    facts = [("Steps", text.count(max(steps))), ("Training tokens", text.count(max(tokens)))]
    rate = median(history, "tokens_per_s")
    if rate is not None:
        facts.append(("Median throughput", f"{text.digits(rate)}{text.NBSP}tokens/s"))
    _, learning_rates = series(history, "learning_rate")
    if learning_rates:
        facts.append(("Peak learning rate", text.power_of_ten(max(learning_rates))))
    return facts
