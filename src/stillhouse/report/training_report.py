"""The report's section on a training on tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse import number_format as text
from stillhouse.report.history import Rows, median, series, training_charts
from stillhouse.report.page import Section


def kl_temperature(recipe: Mapping[str, Any]) -> float:
    """The temperature of the objective's KL on the output logits."""
    terms = recipe.get("objective", {}).get("terms", [])
    of_output = (t for t in terms if t.get("divergence") == "forward_kl" and not t.get("layers"))
    return next((float(t["temperature"]) for t in of_output), 1.0)


def training_section(history: Rows, temperature: float = 1.0) -> Section:
    """The curves of a training on tokens."""
    charts = training_charts(history, "token", temperature)
    facts = _training_facts(history) if charts else []
    return Section("Training", "training", charts=[*charts], facts=facts)


def _training_facts(history: Rows) -> list[tuple[str, str]]:
    steps, tokens = series(history, "tokens", "step")
    facts = [("Steps", text.count(max(steps))), ("Training tokens", text.count(max(tokens)))]
    rate = median(history, "tokens_per_s")
    if rate is not None:
        facts.append(("Throughput, median", f"{text.digits(rate)}{text.NBSP}tokens/s"))
    _, learning_rates = series(history, "learning_rate")
    if learning_rates:
        facts.append(("Highest learning rate", text.power_of_ten(max(learning_rates))))
    return facts
