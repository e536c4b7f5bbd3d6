"""The page about a classifier: how good it is, where it errs, and when it abstains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from stillhouse.evaluate.classification import (
    Abstention,
    ClassificationEvaluation,
    ClassifierResult,
)
from stillhouse.report import report_text as text
from stillhouse.report.charts import Chart, stage_charts, svg_chart
from stillhouse.report.history import smooth
from stillhouse.report.palette import ACCENT, INK, MUTED, role_color, role_name
from stillhouse.report.report_data import StageCost
from stillhouse.report.write import environment, write_page

MOST_SQUARES = 24
"""Labels beyond which a confusion matrix cannot be read, and the worst pairs are listed instead."""
_PAIRS = 15


@dataclass(frozen=True)
class ClassifierReport:
    """parts: texts in each. metrics: of training, a row now and then, with step and loss. replays:
    of the ONNX files, as dictionaries."""

    title: str
    created: str
    teacher: str
    evaluation: ClassificationEvaluation
    parts: dict[str, int]
    metrics: Sequence[dict[str, float]]
    stages: Sequence[StageCost]
    recipe: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    replays: Sequence[dict[str, Any]] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str)

    @classmethod
    def load(cls, path: Path) -> ClassifierReport:
        raw = json.loads(path.read_text(encoding="utf-8"))
        evaluation = ClassificationEvaluation.from_dict(raw["evaluation"])
        stages = [StageCost(**stage) for stage in raw["stages"]]
        return cls(**{**raw, "evaluation": evaluation, "stages": stages})


def write_classifier_report(report: ClassifierReport, path: Path) -> None:
    """One offline HTML page. Raises RunError where it cannot be written."""
    write_page(render_classifier_report(report), path)


def render_classifier_report(report: ClassifierReport) -> str:
    found = report.evaluation
    charts = [speed_chart(found), coverage_chart(found), loss_chart(report.metrics)]
    student = found.of("student")
    assert student is not None
    matrix = None
    if len(found.labels) <= MOST_SQUARES:
        matrix = confusion_chart(student, found.labels, found.has_gold)
    return (
        environment()
        .get_template("classifier.html.j2")
        .render(
            report=report,
            headline=_headline(found),
            second=abstention_sentence(found.abstention),
            columns=[
                (result.role, role_name(result.role), role_color(result.role))
                for result in found.results
            ],
            rows=measures(found),
            charts=[chart for chart in charts if chart is not None],
            matrix=matrix,
            pairs=worst_pairs(student, found.labels),
            costs=stage_charts(report.stages),
            export_rows=[_export_row(replay) for replay in report.replays],
            recipe_yaml=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
        )
    )


def _export_row(replay: dict[str, Any]) -> list[str]:
    """Format, size, KL and the most allowed, top-1 agreement, texts a second, of the checkpoint."""
    rate, beside = replay["texts_per_s"], replay["checkpoint_texts_per_s"]
    return [
        replay["format"],
        text.size(replay["bytes"]),
        text.tiny(max(0.0, replay["kl"])),
        text.tiny(replay["kl_limit"]),
        text.percent(replay["top1_agreement"], 1),
        text.digits(rate),
        f"{text.digits(rate / beside)} ×",
    ]


def _headline(found: ClassificationEvaluation) -> str:
    student, teacher = found.of("student"), found.of("teacher")
    assert student is not None
    assert teacher is not None
    if student.accuracy is not None and teacher.accuracy is not None:
        said = (
            f"The student is right about {text.percent(student.accuracy, 1)} of the test texts, "
            f"the teacher about {text.percent(teacher.accuracy, 1)}"
        )
    else:
        said = f"The student says what the teacher says in {text.percent(student.agreement, 1)}"
        said += " of the test texts"
    if student.texts_per_s and teacher.texts_per_s:
        said += f", at {text.digits(student.texts_per_s / teacher.texts_per_s, 2)} times its speed"
    return said + "."


def abstention_sentence(chosen: Abstention) -> str:
    of = "the teacher" if chosen.measure == "agreement" else "the true label"
    wanted = f"{text.percent(chosen.wanted)} {chosen.measure} with {of}"
    sure = text.percent(chosen.sureness)
    if chosen.threshold is None:
        return (
            f"The calibration texts do not show, at {sure} sureness, that it reaches {wanted} from "
            "any confidence on: it has no threshold to abstain below."
        )
    reached = "none" if chosen.test_reached is None else text.percent(chosen.test_reached, 1)
    return (
        f"Wanted were {wanted}, at {sure} sureness. Answering from a confidence of "
        f"{chosen.threshold:.2f} on, it answers {text.percent(chosen.test_coverage)} of the test "
        f"texts and reaches {reached}."
    )


def measures(found: ClassificationEvaluation) -> list[tuple[str, list[str]]]:
    """The rows of the table: a name, and a cell for each model."""
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, key: str, show: Any) -> None:
        values = [getattr(result, key) for result in found.results]
        if any(value is not None for value in values):
            rows.append((name, [text.DASH if v is None else show(v) for v in values]))

    add("Accuracy", "accuracy", lambda v: text.percent(v, 1))
    add("Macro-F1", "macro_f1", lambda v: f"{v:.3f}")
    add("Agreement with the teacher", "agreement", lambda v: text.percent(v, 1))
    add("KL to the teacher, nats", "kl", text.tiny)
    add("Calibration error", "ece", lambda v: f"{v:.3f}")
    add("Calibration error, to the teacher", "ece_teacher", lambda v: f"{v:.3f}")
    add("Brier score", "brier", lambda v: f"{v:.3f}")
    add("Parameters", "parameters", text.count)
    add("Size", "bytes_on_disk", text.size)
    add("Texts a second", "texts_per_s", text.digits)
    return rows


def worst_pairs(result: ClassifierResult, labels: Sequence[str]) -> list[tuple[str, str, int]]:
    """(true label, said label, how often), the most frequent errors first."""
    found = [
        (labels[row], labels[column], count)
        for row, counts in enumerate(result.confusion)
        for column, count in enumerate(counts)
        if row != column and count
    ]
    return sorted(found, key=lambda pair: -pair[2])[:_PAIRS]


def confusion_chart(result: ClassifierResult, labels: Sequence[str], gold: bool) -> Chart:
    """Rows: the true label, or the teacher's. A square's color is its share of the row."""
    shares = [[count / max(1, sum(row)) for count in row] for row in result.confusion]
    white_to_accent = LinearSegmentedColormap.from_list("share", ["#ffffff", ACCENT])
    whose = "true label" if gold else "teacher’s label"

    def draw(ax: Axes) -> None:
        ax.pcolormesh(shares, cmap=white_to_accent, vmin=0, vmax=1, edgecolors="#dfe3e8")
        for row, counts in enumerate(result.confusion):
            for column, count in enumerate(counts):
                if count:
                    color = "white" if shares[row][column] > 0.55 else INK
                    ax.text(column + 0.5, row + 0.5, str(count), ha="center", va="center",
                            fontsize=10, color=color)  # fmt: skip
        places = [number + 0.5 for number in range(len(labels))]
        ax.set_xticks(places, labels, rotation=45, ha="right")
        ax.set_yticks(places, labels)
        ax.invert_yaxis()
        ax.grid(visible=False)
        ax.set_xlabel("student’s label")
        ax.set_ylabel(whose)

    right = sum(result.confusion[number][number] for number in range(len(labels)))
    total = sum(map(sum, result.confusion))
    alt = f"Confusion matrix of the student: {right} of {total} texts on the diagonal. " + " ".join(
        f"{true} taken for {said}: {count}." for true, said, count in worst_pairs(result, labels)
    )
    height = (110 + 30 * len(labels)) / 72
    return svg_chart("confusion", "What is taken for what", alt, draw, height=height)


def coverage_chart(found: ClassificationEvaluation) -> Chart:
    """How good the student is on the share of texts that it is most confident about."""
    chosen = found.abstention
    shares = [100 * share for share, _ in found.curve]
    right = [100 * good for _, good in found.curve]

    def draw(ax: Axes) -> None:
        ax.plot(shares, right, color=ACCENT, linewidth=2.2)
        ax.axhline(100 * chosen.wanted, color=MUTED, linewidth=1.0, linestyle=(0, (3, 3)))
        if chosen.test_reached is not None:
            ax.plot(100 * chosen.test_coverage, 100 * chosen.test_reached, "o", color=INK)
        ax.set_xlim(0, 100)
        ax.set_ylim(min(60.0, min(right) - 4), 101.5)
        ax.set_xlabel("test texts answered, the most confident first (%)")
        ax.set_ylabel(f"{chosen.measure} on them (%)")

    alt = (
        f"{chosen.measure} against the share of texts answered: {text.percent(right[-1] / 100, 1)} "
        f"when all are answered. {abstention_sentence(chosen)}"
    )
    return svg_chart("coverage", "Answering fewer, answering better", alt, draw)


def speed_chart(found: ClassificationEvaluation) -> Chart | None:
    """Texts a second of teacher and student."""
    timed = [(r, r.texts_per_s) for r in found.results if r.texts_per_s]
    if len(timed) < 2:
        return None

    def draw(ax: Axes) -> None:
        colors = [role_color(result.role) for result, _ in timed]
        bars = ax.barh(range(len(timed)), [rate for _, rate in timed], color=colors, height=0.55)
        ax.bar_label(bars, labels=[text.digits(rate) for _, rate in timed], padding=5, fontsize=11)
        ax.set_yticks(range(len(timed)), [role_name(result.role) for result, _ in timed])
        ax.invert_yaxis()
        ax.set_xlim(0, max(rate for _, rate in timed) * 1.25)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("texts a second")

    alt = "Texts a second: " + ", ".join(
        f"{role_name(result.role)} {text.digits(rate)}" for result, rate in timed
    )
    return svg_chart("rate", "Speed", alt + ".", draw, height=(90 + 44 * len(timed)) / 72)


def loss_chart(metrics: Sequence[dict[str, float]], unit: str = "text") -> Chart | None:
    rows = [row for row in metrics if "loss" in row]
    if len(rows) < 2:
        return None
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smoothed = smooth(losses)

    def draw(ax: Axes) -> None:
        ax.plot(steps, losses, color=ACCENT, alpha=0.28, linewidth=1.0)
        ax.plot(steps, smoothed, color=ACCENT, linewidth=2.2)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("optimizer steps")
        ax.set_ylabel(f"loss (nats a {unit})")

    alt = f"Training loss: from {text.digits(smoothed[0])} to {text.digits(smoothed[-1])} nats."
    return svg_chart("loss", "Training", alt, draw)
