"""What each step changed: one row for each model of the run, in the order of the steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stillhouse.evaluation.results import Evaluation, Fidelity
from stillhouse.report.charts import BarChart, LineChart
from stillhouse.report.language_model_report import language_model_report
from stillhouse.report.page import Section, render
from stillhouse.report.sections import RunFacts
from stillhouse.report.steps_report import steps_section

PRUNED: dict[str, Any] = {"pruning": {}}


@pytest.fixture
def quantized(evaluation: Evaluation) -> Evaluation:
    """A run that also evaluates the student without a refit, rounds to int4, and trains in int4."""
    untrained = evaluation.models[1]
    cut = replace(untrained, role="cut", fidelity=Fidelity(300.0, 6.28, 0.2, 0.1, 8123))
    rounded = replace(
        evaluation.models[2],
        role="quantized",
        bytes_on_disk=60_000_000,
        speed=None,
        fidelity=Fidelity(30.0, 0.962, 0.5, 0.03, 8123),
    )
    trained = replace(
        rounded, role="quantized_trained", fidelity=Fidelity(26.0, 0.481, 0.6, 0.03, 8123)
    )
    return replace(evaluation, models=[*evaluation.models, cut, rounded, trained])


def column(section: Section, place: int) -> list[tuple[str, str]]:
    assert section.table is not None
    return [(row.cells[place].value, row.cells[place].remark) for row in section.table.rows]


def test_steps_are_in_order_with_the_change_of_kl(quantized: Evaluation) -> None:
    section = steps_section(quantized, PRUNED, "int4", [])
    assert section.table is not None
    assert [row.name for row in section.table.rows] == [
        "Teacher",
        "Pruned, not refit",
        "Pruned and refit",
        "Distilled",
        "Rounded to int4",
        "Distilled in int4",
    ]
    assert column(section, 0) == [
        ("0", ""),
        ("6.28", ""),
        ("3.14", "−50%"),
        ("0.481", "−85%"),
        ("0.962", "+100%"),
        ("0.481", "−50%"),
    ]
    assert [value for value, _ in column(section, 3)][-2:] == ["60.0\u00a0MB"] * 2
    assert "8,123 positions" in section.table.title


def test_the_speed_of_a_quantized_model_is_that_of_its_export(
    quantized: Evaluation, replays: list[dict[str, Any]]
) -> None:
    untimed = steps_section(quantized, PRUNED, "int4", [])
    assert [value for value, _ in column(untimed, 4)][-2:] == ["–", "–"]
    assert "llama-cpp-python" in untimed.small
    timed = {**replays[1], "decode_tokens_per_s": 41.0}
    assert column(steps_section(quantized, PRUNED, "int4", [timed]), 4)[-2:] == [
        ("–", ""),
        ("41.0", "gguf-q4_k_m"),
    ]


def test_charts_have_every_step(quantized: Evaluation) -> None:
    bars, sizes = steps_section(quantized, PRUNED, "int4", []).charts
    assert isinstance(bars, BarChart)
    assert [bar.value for bar in bars.bars] == [6.28, 3.14, 0.481, 0.962, 0.481]
    assert isinstance(sizes, LineChart)
    assert len(sizes.lines) == 6


def test_without_additional_steps_there_is_no_section(evaluation: Evaluation) -> None:
    assert steps_section(evaluation, PRUNED, "", []).is_empty


@pytest.mark.run
def test_the_page_starts_with_the_steps_and_the_answers(
    facts: RunFacts, parts: dict[str, Any], quantized: Evaluation
) -> None:
    run = replace(facts, recipe={**facts.recipe, "quantize": {"kind": "int4"}})
    report = language_model_report(run, **{**parts, "evaluation": quantized})
    assert [section.id for section in report.sections[:3]] == ["steps", "generations", "kept"]
    assert "in int4, it keeps 60% at 60.0\u00a0MB" in report.remarks[0]
    assert "What each step changed" in render(report)


def test_training_that_made_the_model_worse_is_reported_below_the_table_and_at_the_top(
    facts: RunFacts, parts: dict[str, Any], quantized: Evaluation
) -> None:
    worse = [
        replace(model, fidelity=replace(model.fidelity, kl=4.0))
        if model.role == "student"
        else model
        for model in quantized.models
    ]
    evaluation = replace(quantized, models=worse)
    section = steps_section(evaluation, PRUNED, "int4", [])
    assert section.table is not None
    assert "no closer to the teacher" in section.table.notes[0]
    report = language_model_report(facts, **{**parts, "evaluation": evaluation})
    assert report.remarks[0] == section.table.notes[0]
