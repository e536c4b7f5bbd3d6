"""The report on a classifier: its quality, its errors, and its abstentions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse import number_format as text
from stillhouse.evaluation.classification_results import ClassificationEvaluation
from stillhouse.evaluation.metrics import abstention_sentence, metrics_of
from stillhouse.evaluation.metrics_table import MetricsTable
from stillhouse.evaluation.results import role_name
from stillhouse.generation.answer_requests import cost_line
from stillhouse.report.charts import (
    ACCENT,
    INK,
    MUTED,
    Bar,
    BarChart,
    Chart,
    Line,
    LineChart,
    MatrixChart,
    role_color,
)
from stillhouse.report.formats import Replays
from stillhouse.report.history import Rows, training_charts
from stillhouse.report.page import Report, Section
from stillhouse.report.sections import (
    RunFacts,
    assemble,
    cost_section,
    notes_section,
)

MOST_SQUARES = 24
"""With more labels, the most confused pairs are listed instead of a confusion matrix."""
_PAIRS = 15


def classifier_report(
    run: RunFacts,
    *,
    evaluation: ClassificationEvaluation,
    parts: Mapping[str, int],
    judgment: Mapping[str, Any],
    history: Rows = (),
    replays: Replays = (),
) -> Report:
    """Build the report.

    parts: the number of texts in each split. judgment: the summary of the teacher's labels.
    history: training rows with `step` and `loss`. replays: the ONNX files' replays, as
    dictionaries.
    """
    data = (
        f"Texts: {parts['train']:,} for training, {parts['calibration']:,} to choose the "
        f"threshold, {parts['test']:,} for testing."
    )
    cost = [f"Cost of the teacher’s answers: {cost_line(judgment)}."] if "usd" in judgment else []
    return assemble(
        "classifier",
        run,
        _headline(evaluation),
        Section("Quality", "kept", table=metrics_of(evaluation), charts=_charts(evaluation)),
        _confusion_section(evaluation),
        Section("Training", "training", charts=[*training_charts(history, "text")]),
        _export_section(replays),
        cost_section(run.stages),
        notes_section(evaluation.notes),
        remarks=[abstention_sentence(evaluation.abstention), data, *cost],
    )


def _headline(found: ClassificationEvaluation) -> str:
    student, teacher = found.of("student"), found.of("teacher")
    assert student is not None
    assert teacher is not None
    if student.accuracy is not None and teacher.accuracy is not None:
        sentence = (
            f"The student classifies {text.percent(student.accuracy, 1)} of the test texts "
            f"correctly, the teacher {text.percent(teacher.accuracy, 1)}"
        )
    else:
        sentence = (
            f"The student agrees with the teacher on {text.percent(student.agreement, 1)} of the "
            "test texts"
        )
    if student.texts_per_s and teacher.texts_per_s:
        faster = text.digits(student.texts_per_s / teacher.texts_per_s, 2)
        sentence += f", at {faster} times the teacher’s speed"
    return sentence + "."


def _charts(found: ClassificationEvaluation) -> list[Chart]:
    """Charts of the student's quality on the texts it is most confident about, and of speed."""
    chosen = found.abstention
    shares = [100 * share for share, _ in found.curve]
    right = [100 * good for _, good in found.curve]
    wanted = 100 * chosen.wanted
    lines = [
        Line(shares, right, ACCENT),
        Line([0.0, 100.0], [wanted, wanted], MUTED, style="level"),
    ]
    if chosen.test_reached is not None:
        at = [100 * chosen.test_coverage], [100 * chosen.test_reached]
        lines.append(Line(*at, INK, style="dots"))
    charts: list[Chart] = [
        LineChart(
            "Quality against coverage",
            "test texts answered, most confident first (%)",
            f"{chosen.measure} on these texts (%)",
            lines,
            x_limits=(0, 100),
            y_limits=(min(60.0, min(right) - 4), 101.5),
        )
    ]
    timed = [(result.role, result.texts_per_s) for result in found.results if result.texts_per_s]
    if len(timed) > 1:
        bars = [Bar(role_name(r), rate, text.digits(rate), role_color(r)) for r, rate in timed]
        charts.append(BarChart("Speed", "texts/s", bars))
    return charts


def _confusion_section(found: ClassificationEvaluation) -> Section:
    """A confusion matrix, or the most confused pairs if there are many labels."""
    student = found.of("student")
    assert student is not None
    reference = "true label" if found.has_gold else "teacher’s label"
    matrix = MatrixChart("Confusion matrix", "student’s label", reference, found.labels,
                         student.confusion)  # fmt: skip
    if len(found.labels) <= MOST_SQUARES:
        return Section("Errors", "errors", charts=[matrix])
    rows = [[was, predicted, f"{count:,}"] for was, predicted, count in matrix.errors()[:_PAIRS]]
    heads = [reference.capitalize(), "Student’s label", "Texts"]
    return Section("Errors", "errors", table=MetricsTable.of_text(heads, rows) if rows else None)


def _export_section(replays: Replays) -> Section:
    heads = ["Format", "Size", "KL (nats/text)", "KL limit", "Top-1 agreement", "Texts/s",
             "Relative to the checkpoint"]  # fmt: skip
    lead = (
        "Each ONNX file, run by onnxruntime in a fresh process and compared with the float32 "
        "checkpoint on the same CPU and the calibration texts."
    )
    rows = [_export_row(replay) for replay in replays]
    table = MetricsTable.of_text(heads, rows) if rows else None
    return Section("Exports, replayed", "export", lead=lead, table=table)


def _export_row(replay: Mapping[str, Any]) -> list[str]:
    rate = replay["texts_per_s"]
    return [
        replay["format"],
        text.size(replay["bytes"]),
        text.tiny(max(0.0, replay["kl"])),
        text.tiny(replay["kl_limit"]),
        text.percent(replay["top1_agreement"], 1),
        text.digits(rate),
        text.times(rate / replay["checkpoint_texts_per_s"]),
    ]
