"""The report section on what each step changed: pruning, refitting, distilling, quantizing, and
quantization-aware training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse import number_format as text
from stillhouse.evaluation.metrics_table import Cell, Column, MetricsTable, Row
from stillhouse.evaluation.results import Evaluation, ModelResult, farther_after_training
from stillhouse.report.charts import Bar, BarChart, Chart, LineChart, dot, in_units, role_color
from stillhouse.report.formats import KL_LABEL, Replays
from stillhouse.report.page import Section

Named = list[tuple[str, ModelResult]]

_LEAD = (
    "Each row is the model after one more step, measured on the same {tokens} positions of "
    "held-out text. Percentages are the change in KL from the row above."
)
_UNTIMED = (
    "Decoding processes one sequence at a time. Steps that keep the shape keep the speed. A "
    "quantized model runs at the speed of its export’s runtime, which is measured for a GGUF file "
    "if llama-cpp-python is installed (stillhouse[llama-cpp])."
)


def steps_section(
    evaluation: Evaluation, student: Mapping[str, Any], kind: str, replays: Replays
) -> Section:
    """Build the section with each step's KL, agreement, size, and speed; empty unless the student
    was also measured without the refit, or quantized.

    student: how the student was built (`build_student`). kind: the recipe's `quantize.kind`.
    """
    title = "What each step changed"
    steps = named_steps(evaluation, student, kind)
    if len(steps) < 4:
        return Section(title, "steps")
    tokens = f"{steps[0][1].fidelity.tokens:,}"
    return Section(
        title,
        "steps",
        table=step_table(steps, replays, _LEAD.format(tokens=tokens)),
        small=_UNTIMED if any(model.role.startswith("quantized") for _, model in steps) else "",
        charts=step_charts(steps),
    )


def named_steps(evaluation: Evaluation, student: Mapping[str, Any], kind: str) -> Named:
    """Return the run's models in the order in which they are made, teacher first."""
    cut = evaluation.result("cut") is not None
    pruned = "Pruned and refit" if cut else "Pruned" if "pruning" in student else "Before training"
    names = {
        "teacher": "Teacher",
        "cut": "Pruned, not refit",
        "untrained": pruned,
        "student": "Distilled",
        "quantized": f"Rounded to {kind}",
        "quantized_trained": f"Distilled in {kind}",
    }
    found = [(name, evaluation.result(role)) for role, name in names.items()]
    return [(name, model) for name, model in found if model is not None]


def step_table(steps: Named, replays: Replays, title: str) -> MetricsTable:
    heads = [KL_LABEL, "Top-1 agreement", "Perplexity", "Size", "Decoding (tokens/s)"]
    shipped = next((one for one in replays if one.get("decode_tokens_per_s")), None)
    rows = []
    for place, (name, model) in enumerate(steps):
        before = steps[place - 1][1].fidelity.kl if place else 0.0
        speed, remark = text.DASH, ""
        if model.speed is not None:
            speed = text.digits(model.speed.decode_tokens_per_s)
        elif place == len(steps) - 1 and shipped is not None:
            speed, remark = text.digits(float(shipped["decode_tokens_per_s"])), shipped["format"]
        cells = [
            Cell(text.tiny(model.fidelity.kl), _change(model.fidelity.kl, before)),
            Cell(text.percent(model.fidelity.top1_agreement, 1)),
            Cell(text.digits(model.fidelity.perplexity, 4)),
            Cell(text.size(float(model.bytes_on_disk))),
            Cell(speed, str(remark)),
        ]
        rows.append(Row(name, cells, strong=model.role == "student"))
    notes = farther_after_training([model for _, model in steps])
    return MetricsTable(title, [Column(head) for head in heads], rows, notes, corner="Step")


def _change(kl: float, before: float) -> str:
    if not before:
        return ""
    sign = "−" if kl < before else "+"
    return f"{sign}{text.percent(abs(kl / before - 1))}"


def step_charts(steps: Named) -> list[Chart]:
    """Chart KL after every step, and KL against bytes."""
    made = steps[1:]  # the teacher's KL is 0
    bars = [
        Bar(name, model.fidelity.kl, text.tiny(model.fidelity.kl), role_color(model.role))
        for name, model in made
    ]
    sizes, label = in_units([float(model.bytes_on_disk) for _, model in steps], "bytes")
    dots = [
        dot(name, size, model.fidelity.kl, role_color(model.role), may_be_cut=model.role == "cut")
        for (name, model), size in zip(steps, sizes, strict=True)
    ]
    return [
        BarChart("KL to the teacher after each step", "nats/token", bars),
        LineChart("Quality against size", label, KL_LABEL, dots),
    ]
