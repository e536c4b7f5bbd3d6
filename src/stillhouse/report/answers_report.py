"""The report on an answering student: the quality of its answers, with examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.evaluation.answers import AnsweredText, AnswersEvaluation
from stillhouse.evaluation.metrics import ANSWER_METRICS, metrics_of
from stillhouse.evaluation.results import role_name
from stillhouse.generation.answer_requests import cost_line
from stillhouse.report.charts import INK, role_color
from stillhouse.report.history import Rows, training_section
from stillhouse.report.own_text_report import own_text_section
from stillhouse.report.page import Answer, Report, Section, SideBySide
from stillhouse.report.sections import (
    RunFacts,
    assemble,
    cost_section,
    notes_section,
)

_HEADLINE = ("field_f1", "agreement_f1", "score", "exact", "agreement", "valid")
"""The headline shows the first of these metrics that was measured."""


def answers_report(
    run: RunFacts,
    *,
    evaluation: AnswersEvaluation,
    parts: Mapping[str, int],
    answers: Mapping[str, Any],
    history: Rows = (),
) -> Report:
    """Build the report. parts: the number of texts in each split. answers: the summary of the
    teacher's answers. history: the training rows of metrics.jsonl."""
    examples = [_side_by_side(example) for example in evaluation.examples]
    data = f"Texts: {parts['train']:,} for training, {parts['test']:,} for testing."
    return assemble(
        "answers",
        run,
        _headline(evaluation),
        Section("Quality", "kept", table=metrics_of(evaluation)),
        Section("Answers side by side", "examples", texts=examples),
        training_section(history),
        own_text_section([], history),
        cost_section(run.stages),
        notes_section(evaluation.notes),
        remarks=[_answers_sentence(answers), data],
    )


def _side_by_side(example: AnsweredText) -> SideBySide:
    answers = [] if example.gold is None else [Answer("Reference answer", example.gold, INK)]
    answers += [Answer(role_name(r), text, role_color(r)) for r, text in example.answers.items()]
    return SideBySide(example.text, answers)


def _headline(found: AnswersEvaluation) -> str:
    """The student's first metric, compared with its teacher's and the initial student's."""
    student = found.of("student")
    assert student is not None
    key = next(key for key in _HEADLINE if key in student.figures)
    metric = ANSWER_METRICS[key]
    values = [
        f"{metric.show(result.figures[key])} ({role_name(result.role).lower()})"
        for result in found.results
        if key in result.figures
    ]
    return f"{metric.name}: {', '.join(values)}."


def _answers_sentence(answers: Mapping[str, Any]) -> str:
    dropped = ", ".join(f"{name} {count:,}" for name, count in answers["dropped"].items())
    return (
        f"The teacher answered {answers['answered']:,} of {answers['asked']:,} requests; "
        f"{answers['kept']:,} answers were kept for training. Answers dropped by filters: "
        f"{dropped or 'none'}. Cost: {cost_line(answers)}."
    )
