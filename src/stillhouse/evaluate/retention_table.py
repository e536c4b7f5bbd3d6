"""The retention table: what each model kept of the teacher, and what it costs."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from stillhouse.evaluate.results import Evaluation, ModelResult

ROLE_NAMES = {
    "teacher": "teacher",
    "untrained": "untrained",
    "student": "student",
    "fine_tuned": "fine-tuned",
    "quantized": "quantized",
    "quantized_trained": "trained quantized",
}


def retention_table(evaluation: Evaluation) -> Table:
    """One row a model; under a figure, in percent, its relation to the teacher's.

    Retention, larger is better, 100 % is the teacher:
    perplexity: teacher's perplexity / model's, that is exp(-extra nats a token);
    top-1: the agreement itself, which is 100 % for the teacher.
    Cost, as a share of the teacher's: parameters, size, memory. Gain: prefill, decode.
    KL and calibration error have no percent: KL is already relative to the teacher (0), and a
    student can be better calibrated than its teacher.
    """
    teacher = evaluation.result("teacher")
    table = Table(title="What was kept, and what it costs", box=None, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for heading in ("ppl", "KL\nnats", "top-1", "ECE", "params", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    timed = any(model.speed for model in evaluation.models)
    for heading in ("prefill\ntok/s", "decode\ntok/s", "memory\npeak") if timed else ():
        table.add_column(heading, justify="right", no_wrap=True)
    for model in evaluation.models:
        cells = _quality_cells(model, teacher) + (_speed_cells(model, teacher) if timed else [])
        table.add_row(ROLE_NAMES.get(model.role, model.role), *cells)
    return table


def task_table(evaluation: Evaluation) -> Table | None:
    """One row a task's metric, one column a model, and its percent of the teacher's score."""
    names = sorted({name for model in evaluation.models for name in model.tasks})
    if not names:
        return None
    teacher = evaluation.result("teacher")
    table = Table(title="Tasks", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task/metric")
    for model in evaluation.models:
        table.add_column(ROLE_NAMES.get(model.role, model.role), justify="right")
    for name in names:
        reference = teacher.tasks.get(name) if teacher else None
        cells = []
        for model in evaluation.models:
            score = model.tasks.get(name)
            cells.append("–" if score is None else f"{score:.4g}{_percent(score, reference)}")
        table.add_row(name, *cells)
    return table


def perplexity_retention(model: ModelResult, teacher: ModelResult) -> float:
    """Teacher's perplexity / model's: 1 for the teacher, exp(-d) for d extra nats a token."""
    return teacher.fidelity.perplexity / model.fidelity.perplexity


def _quality_cells(model: ModelResult, teacher: ModelResult | None) -> list[str]:
    fidelity = model.fidelity
    kept = perplexity_retention(model, teacher) if teacher else None
    parameters, size = (teacher.parameters, teacher.bytes_on_disk) if teacher else (None, None)
    return [
        f"{fidelity.perplexity:.4g}" + _percent(kept, 1.0),
        f"{fidelity.kl:.3f}",
        f"{fidelity.top1_agreement:.1%}",
        f"{fidelity.calibration_error:.3f}",
        _short(model.parameters) + _percent(model.parameters, parameters),
        f"{_short(model.bytes_on_disk)}B" + _percent(model.bytes_on_disk, size),
    ]


def _speed_cells(model: ModelResult, teacher: ModelResult | None) -> list[str]:
    mine, reference = model.speed, teacher.speed if teacher else None
    if mine is None:
        return ["–", "–", "–"]
    prefill, decode, memory = (
        (
            reference.prefill_tokens_per_s,
            reference.decode_tokens_per_s,
            reference.peak_memory_bytes,
        )
        if reference
        else (None, None, None)
    )
    return [
        f"{mine.prefill_tokens_per_s:,.0f}" + _percent(mine.prefill_tokens_per_s, prefill),
        f"{mine.decode_tokens_per_s:,.1f}" + _percent(mine.decode_tokens_per_s, decode),
        f"{_short(mine.peak_memory_bytes)}B" + _percent(mine.peak_memory_bytes, memory),
    ]


def _percent(value: float | None, reference: float | None) -> str:
    """A second line with the percentage; nothing where there is nothing to compare with."""
    if value is None or not reference:
        return ""
    return f"\n[dim]{value / reference:.0%}[/dim]"


def _short(value: float) -> str:
    """Three significant digits and a decimal unit, four from a hundred on: 13.4M, 134.5M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if scaled >= 100 else f"{scaled:.3g}{unit}"
    return f"{value:.0f}"
