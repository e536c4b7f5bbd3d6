"""Turns a report's data into the strings that the template lays out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from stillhouse.evaluate.results import ModelResult
from stillhouse.report import charts, history
from stillhouse.report import report_text as text
from stillhouse.report.charts import Chart
from stillhouse.report.formats import form_charts, form_rows, forms
from stillhouse.report.palette import ACCENT, MUTED, role_color, role_name, role_order
from stillhouse.report.report_data import ReportData
from stillhouse.report.retention import Column, Table, retention_table, speed_ratio

OPTIMAL_TOKENS = 20
"""Training tokens a parameter from which more parameters are the better use of FLOPs
(Hoffmann et al. 2022, arXiv 2203.15556)."""


@dataclass(frozen=True)
class Figure:
    """One key figure: a number, what it is, and a line that puts it into proportion."""

    value: str
    name: str
    remark: str = ""


@dataclass(frozen=True)
class Answer:
    column: Column
    text: str


@dataclass(frozen=True)
class Page:
    """All that the template reads; an empty part hides its section."""

    data: ReportData
    headline: str
    second_line: str
    figures: list[Figure]
    retention: Table | None
    quality_charts: list[Chart]
    training_charts: list[Chart]
    training_facts: list[tuple[str, str]]
    generations: list[tuple[str, list[Answer]]]
    stage_rows: list[list[str]]
    stage_charts: list[Chart]
    reused: bool
    comparison: list[tuple[str, str, str]]
    student_facts: list[tuple[str, str]]
    export_rows: list[list[str]]
    form_rows: list[list[str]]
    form_charts: list[Chart]
    replayed_texts: list[tuple[str, list[Answer]]]
    notes: list[str]
    recipe_yaml: str
    machine: list[tuple[str, str]]
    versions: list[tuple[str, str]] = field(default_factory=list)


def build_page(data: ReportData) -> Page:
    """Draws the charts and formats every number."""
    models = _models(data)
    shipped = forms(models, data.replays)
    curve = history.training_curve(data.history, _kl_temperature(data.recipe))
    return Page(
        data=data,
        headline=_headline(data, models),
        second_line=_second_line(models),
        figures=_figures(data, models),
        retention=retention_table(models),
        quality_charts=_quality_charts(models),
        training_charts=_training_charts(data, curve),
        training_facts=_training_facts(data) if curve else [],
        generations=_generations(data),
        stage_rows=_stage_rows(data),
        stage_charts=charts.stage_charts(data.stages),
        reused=any(stage.reused for stage in data.stages),
        comparison=_comparison(data),
        student_facts=_student_facts(data.student),
        export_rows=[_export_row(replay) for replay in data.replays],
        form_rows=form_rows(shipped),
        form_charts=form_charts(shipped),
        replayed_texts=_replayed_texts(data.replays),
        notes=list(dict.fromkeys(_notes(data))),
        recipe_yaml=yaml.safe_dump(data.recipe, sort_keys=False, allow_unicode=True, width=88)
        if data.recipe
        else "",
        machine=_facts(data.machine),
        versions=[(str(name), str(version)) for name, version in data.versions.items()],
    )


def _models(data: ReportData) -> dict[str, ModelResult]:
    if data.evaluation is None:
        return {}
    ordered = sorted(data.evaluation.models, key=lambda model: role_order(model.role))
    return {model.role: model for model in ordered}


# --- headline and key figures ----------------------------------------------------------------


def _headline(data: ReportData, models: dict[str, ModelResult]) -> str:
    teacher, student = models.get("teacher"), models.get("student")
    if student is None:
        return "What this run made and what it cost; the student was not evaluated."
    kept = text.percent(student.fidelity.top1_agreement)
    sentence = f"The student keeps {kept} of the teacher’s top-1 choices"
    if teacher is not None:
        sentence += f" at {text.percent(student.parameters / teacher.parameters)} of its parameters"
        faster = speed_ratio(student, teacher, "decode_tokens_per_s")
        if faster is not None:
            sentence += f" and {text.digits(faster)} times its decoding speed"
    if data.scratch is not None:
        sentence += f", after {text.count(data.scratch.tokens)} tokens of distillation"
    return sentence + "."


def _second_line(models: dict[str, ModelResult]) -> str:
    student, untrained = models.get("student"), models.get("untrained")
    tuned = models.get("fine_tuned")
    parts = []
    if student and untrained:
        parts.append(f"before training it kept {text.percent(untrained.fidelity.top1_agreement)}")
    if student and tuned:
        parts.append(
            "plain fine-tuning on the same tokens keeps "
            f"{text.percent(tuned.fidelity.top1_agreement)}"
        )
    line = "; ".join(parts)
    return f"{line[0].upper()}{line[1:]}." if line else ""


def _figures(data: ReportData, models: dict[str, ModelResult]) -> list[Figure]:
    student, teacher, before = (models.get(r) for r in ("student", "teacher", "untrained"))
    figures = []
    if student is not None:
        kept, kl = student.fidelity.top1_agreement, student.fidelity.kl
        old = before.fidelity if before else None
        figures += [
            Figure(
                text.percent(kept, 1),
                "top-1 agreement",
                f"untrained: {text.percent(old.top1_agreement, 1)}" if old else "",
            ),
            Figure(
                text.tiny(kl),
                "KL to the teacher, nats a token",
                f"untrained: {text.tiny(old.kl)}" if old else "",
            ),
            Figure(
                text.digits(student.fidelity.perplexity),
                "held-out perplexity",
                f"teacher: {text.digits(teacher.fidelity.perplexity)}" if teacher else "",
            ),
            Figure(
                text.count(student.parameters),
                "parameters",
                f"teacher: {text.count(teacher.parameters)}" if teacher else "",
            ),
        ]
        if student.speed:
            rate = f"{text.digits(student.speed.decode_tokens_per_s)}{text.NBSP}tok/s"
            remark = ""
            if teacher and teacher.speed:
                remark = f"teacher: {text.digits(teacher.speed.decode_tokens_per_s)}"
            figures.append(Figure(rate, "decoding speed", remark))
    if data.stages:
        total = sum(stage.seconds for stage in data.stages)
        figures.append(Figure(text.seconds(total), "whole run", f"{len(data.stages)} stages"))
    return figures


# --- charts and training ---------------------------------------------------------------------


def _quality_charts(models: dict[str, ModelResult]) -> list[Chart]:
    results = list(models.values())
    if len(results) < 2:
        return []
    drawn = [charts.size_chart(results), charts.speed_chart(results)]
    return [chart for chart in drawn if chart is not None]


def _kl_temperature(recipe: dict[str, Any]) -> float:
    terms = recipe.get("objective", {}).get("terms", [])
    of_output = (t for t in terms if t.get("divergence") == "forward_kl" and not t.get("layers"))
    return next((float(t["temperature"]) for t in of_output), 1.0)


def _training_charts(data: ReportData, curve: history.Curve | None) -> list[Chart]:
    if curve is None:
        return []
    drawn = [charts.training_chart(curve)]
    tokens, norms = history.series(data.history, "grad_norm")
    if len(norms) >= 2:
        drawn.append(charts.gradient_chart(tokens, norms, history.smooth(norms)))
    return drawn


def _training_facts(data: ReportData) -> list[tuple[str, str]]:
    rows = [row for row in data.history if "tokens" in row and "step" in row]
    facts = [
        ("Steps", text.count(max(row["step"] for row in rows))),
        ("Training tokens", text.count(max(row["tokens"] for row in rows))),
    ]
    rate = history.median(data.history, "tokens_per_s")
    if rate is not None:
        facts.append(("Throughput, median", f"{text.digits(rate)}{text.NBSP}tokens/s"))
    _, learning_rates = history.series(data.history, "learning_rate")
    if learning_rates:
        facts.append(("Highest learning rate", text.power_of_ten(max(learning_rates))))
    return facts


def _generations(data: ReportData) -> list[tuple[str, list[Answer]]]:
    if data.evaluation is None:
        return []
    shown = []
    for generation in data.evaluation.generations:
        roles = sorted(generation.answers, key=role_order)
        answers = [
            Answer(Column(r, role_name(r), role_color(r)), generation.answers[r]) for r in roles
        ]
        shown.append((generation.prompt, answers))
    return shown


# --- costs and facts -------------------------------------------------------------------------


def _stage_rows(data: ReportData) -> list[list[str]]:
    """Name, tokens, FLOPs, seconds, peak memory of each stage, then their sum."""
    rows = []
    for stage in data.stages:
        name = f"{stage.name} (reused)" if stage.reused else stage.name
        memory = (
            text.DASH if stage.peak_memory_bytes is None else text.size(stage.peak_memory_bytes)
        )
        tokens = text.count(stage.tokens) if stage.tokens else text.DASH
        rows.append([name, tokens, text.flops(stage.flops), text.seconds(stage.seconds), memory])
    if len(rows) > 1:
        peaks = [s.peak_memory_bytes for s in data.stages if s.peak_memory_bytes is not None]
        rows.append(
            [
                "Whole run",
                text.count(sum(stage.tokens for stage in data.stages)),
                text.flops(sum(stage.flops for stage in data.stages)),
                text.seconds(sum(stage.seconds for stage in data.stages)),
                text.size(max(peaks)) if peaks else text.DASH,
            ]
        )
    return rows


def _comparison(data: ReportData) -> list[tuple[str, str, str]]:
    """What was trained, tokens, FLOPs: this run beside training the student from scratch."""
    cost = data.scratch
    if cost is None or cost.tokens <= 0:
        return []
    rows = [
        ("This distillation", cost.tokens, cost.distillation_flops),
        ("From scratch, same tokens", cost.tokens, cost.scratch_flops),
    ]
    parameters = cost.scratch_flops / (6 * cost.tokens)
    optimal = OPTIMAL_TOKENS * parameters
    if optimal > cost.tokens:
        rows.append(
            (f"From scratch, {OPTIMAL_TOKENS} tokens a parameter", round(optimal),
             round(6 * parameters * optimal))
        )  # fmt: skip
    return [(name, text.count(tokens), text.flops(flops)) for name, tokens, flops in rows]


def _facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels and values as text; a key that ends in `_bytes` is a size."""
    facts = []
    for key, value in values.items():
        if key.endswith("_bytes") and isinstance(value, int):
            facts.append((text.label(key.removesuffix("_bytes")), text.size(value)))
        else:
            facts.append((text.label(key), text.describe(value)))
    return facts


def _student_facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary's facts, those of its parts (pruning) among them; what is empty is left out."""
    facts = []
    for key, value in summary.items():
        if key == "notes" or value in (None, [], {}, ()):
            continue
        if key.endswith("parameters") and isinstance(value, dict):
            facts.append((text.label(key), text.describe(value.get("total"))))
        elif isinstance(value, dict):
            facts += _student_facts(value)
        elif key in ("ffn_size", "layers") and isinstance(value, list | tuple):
            facts.append((text.label(key), " → ".join(text.describe(size) for size in value)))
        else:
            facts.append((text.label(key), text.describe(value)))
    return facts


def _student_notes(summary: dict[str, Any]) -> list[str]:
    """The notes of the summary and of its parts."""
    parts = [summary, *(part for part in summary.values() if isinstance(part, dict))]
    return [str(note) for part in parts for note in part.get("notes", [])]


def _notes(data: ReportData) -> Iterator[str]:
    yield from data.notes
    yield from _student_notes(data.student)
    yield from data.evaluation.notes if data.evaluation else []
    for replay in data.replays:
        yield from replay.get("notes", [])


def _export_row(replay: dict[str, Any]) -> list[str]:
    """Format, number type, size, top-1 agreement, KL to the checkpoint, KL allowed, llama.cpp's."""
    llama = replay.get("llama_cpp")
    return [
        str(replay["format"]),
        str(replay["dtype"]),
        text.size(float(replay["bytes"])),
        text.percent(float(replay["top1_agreement"]), 1),
        text.tiny(float(replay["kl"])),
        text.tiny(float(replay["kl_limit"])),
        text.tiny(float(llama["kl"])) if llama else text.DASH,
    ]


def _replayed_texts(replays: list[dict[str, Any]]) -> list[tuple[str, list[Answer]]]:
    """Each prompt, with what the checkpoint and every export write after it."""
    shown = []
    for texts in zip(*(replay["texts"] for replay in replays), strict=True):
        answers = [Answer(Column("student", "Trained checkpoint", MUTED), texts[0]["source"])]
        for replay, answer in zip(replays, texts, strict=True):
            answers.append(Answer(Column("export", replay["format"], ACCENT), answer["exported"]))
        shown.append((texts[0]["prompt"], answers))
    return shown
