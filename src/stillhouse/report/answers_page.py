"""The page about a student that answers: how good its answers are, and what they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from stillhouse.evaluate.answers import AnswersEvaluation
from stillhouse.report import report_text as text
from stillhouse.report.charts import stage_charts
from stillhouse.report.classifier_page import loss_chart
from stillhouse.report.palette import role_color, role_name
from stillhouse.report.report_data import StageCost
from stillhouse.report.write import environment, write_page
from stillhouse.synthesis.filters import dropped_counts


def _percent(value: float) -> str:
    return text.percent(value, 1)


MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "valid": ("Valid by the schema", _percent),
    "field_f1": ("F1 of the fields, to the true answers", "{:.3f}".format),
    "exact": ("The whole answer is the true one", _percent),
    "agreement_f1": ("F1 of the fields, to the teacher", "{:.3f}".format),
    "agreement": ("The same words as the teacher", _percent),
    "surprise": ("The teacher's surprise, nats a token", "{:.3f}".format),
    "preferred": ("Preferred to the teacher's by the judge", _percent),
    "consistent": ("The judge says so in both orders", _percent),
    "judge_read": ("Verdicts that could be read", _percent),
    "score": ("Score", text.digits),
    "parameters": ("Parameters", text.count),
    "answers_per_s": ("Answers a second", text.digits),
}
"""Name and format of each figure, in the order of the table."""


@dataclass(frozen=True)
class AnswersReport:
    """parts: texts in each. answers: what came of the teacher's. metrics: of training."""

    title: str
    created: str
    teacher: str
    evaluation: AnswersEvaluation
    parts: dict[str, int]
    answers: dict[str, Any]
    metrics: Sequence[dict[str, Any]]
    stages: Sequence[StageCost]
    recipe: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str)

    @classmethod
    def load(cls, path: Path) -> AnswersReport:
        raw = json.loads(path.read_text(encoding="utf-8"))
        evaluation = AnswersEvaluation.from_dict(raw["evaluation"])
        stages = [StageCost(**stage) for stage in raw["stages"]]
        return cls(**{**raw, "evaluation": evaluation, "stages": stages})


def write_answers_report(report: AnswersReport, path: Path) -> None:
    """One offline HTML page. Raises RunError where it cannot be written."""
    found = report.evaluation
    columns = [(r.role, role_name(r.role), role_color(r.role)) for r in found.results]
    loss = loss_chart(report.metrics, "token")
    page = (
        environment()
        .get_template("answers.html.j2")
        .render(
            report=report,
            headline=headline(found),
            answers=answers_sentence(report.answers),
            columns=columns,
            rows=answer_measures(found),
            fields=field_rows(found),
            charts=[*([] if loss is None else [loss]), *stage_charts(report.stages)],
            recipe_yaml=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
        )
    )
    write_page(page, path)


def answer_measures(found: AnswersEvaluation) -> list[tuple[str, list[str]]]:
    """The rows of the table: a name, and a cell for each model."""
    rows = []
    for key, (name, show) in MEASURES.items():
        values = [result.figures.get(key) for result in found.results]
        if any(value is not None for value in values):
            rows.append((name, [text.DASH if v is None else show(v) for v in values]))
    return rows


def field_rows(found: AnswersEvaluation) -> list[tuple[str, list[str]]]:
    """F1 of each field, a cell for each model."""
    names = sorted({name for result in found.results for name in result.fields})
    return [
        (name, [f"{r.fields[name]:.3f}" if name in r.fields else text.DASH for r in found.results])
        for name in names
    ]


def headline(found: AnswersEvaluation) -> str:
    """What the student reaches of the first measure, beside its teacher and its start."""
    student = found.of("student")
    assert student is not None
    key = next(key for key in ("field_f1", "agreement_f1", "score", "exact", "agreement", "valid")
               if key in student.figures)  # fmt: skip
    name, show = MEASURES[key]
    said = [
        f"{show(result.figures[key])} ({role_name(result.role).lower()})"
        for result in found.results
        if key in result.figures
    ]
    return f"{name}: {', '.join(said)}."


def answers_sentence(answers: dict[str, Any]) -> str:
    counts = dropped_counts(answers).items()
    dropped = ", ".join(f"{name} {count:,}" for name, count in counts)
    cost = "unknown" if answers["usd"] is None else f"${answers['usd']:,.4f}"
    return (
        f"The teacher answered {answers['answered']:,} of {answers['asked']:,} questions; the "
        f"student learned from {answers['kept']:,} answers. "
        f"Dropped by filters: {dropped or 'none'}. Cost: {cost}."
    )
