"""The live pages as HTML: the list of runs, and a run with its steps, curves, and metrics.

Curves and tables are report sections, rendered with the report's template.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from markupsafe import Markup

from stillhouse import number_format as text
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.answers import AnswersEvaluation
from stillhouse.evaluation.classification_results import ClassificationEvaluation
from stillhouse.evaluation.family_evaluation import FamilyEvaluation
from stillhouse.evaluation.metrics import metrics_of
from stillhouse.evaluation.results import Evaluation, Saved
from stillhouse.pipeline.run_progress import StepProgress
from stillhouse.progress import Work
from stillhouse.report.charts import Chart
from stillhouse.report.history import training_charts, training_section
from stillhouse.report.own_text_report import own_text_charts
from stillhouse.report.page import Section, environment
from stillhouse.training.checkpoints import read_metrics
from stillhouse.watch.watched_runs import Training, WatchedPart, WatchedRun, find_runs, read_run

CHATS = {
    "language model": "The teacher and the student answer the same prompt.",
    "family": "The teacher and a member of the family answer the same prompt.",
    "extract": "Enter a text; the teacher and the student answer it with the recipe's prompt.",
    "generate": "Enter a text; the teacher and the student answer it with the recipe's prompt.",
    "classify": "Enter a text; the teacher and the student label it.",
}
MARKS = {"waiting": "○", "working": "◐", "done": "●", "reused": "●"}
MARKS |= dict.fromkeys(("failed", "stopped"), "✕")
_EVALUATIONS: dict[str, type[Saved]] = {
    "language model": Evaluation,
    "family": Evaluation,
    "classify": ClassificationEvaluation,
    "extract": AnswersEvaluation,
    "generate": AnswersEvaluation,
}


def index_page(folder: Path) -> str:
    return _render("index.html.j2", content=index_part(folder), folder=str(folder))


def index_part(folder: Path) -> str:
    """Render the changing part of the list of runs."""
    runs = [read_run(name, path) for name, path in find_runs(folder).items()]
    runs.sort(key=lambda run: (run.state != "running", -run.changed))
    return _render("runs.html.j2", runs=runs, step=current_step, share=share, ago=_when)


def run_page(run: WatchedRun, token: str, threads: int) -> str:
    members = [part.name for part in run.parts if part.name]
    return _render(
        "run.html.j2",
        run=run,
        content=run_part(run),
        token=token,
        about=CHATS.get(run.kind, CHATS["language model"]),
        turns=run.kind in ("language model", "family"),
        members=list(reversed(members)),
        threads=threads,
    )


def run_part(run: WatchedRun) -> str:
    """Render the changing part of a run's page."""
    return _render(
        "live.html.j2",
        run=run,
        family="" if run.evaluation is None else _members(run.evaluation),
        sections=_sections,
        mark=MARKS.get,
        detail=_step_detail,
        share=share,
        remaining=remaining,
    )


def _render(template: str, **values: object) -> str:
    return environment("watch").get_template(template).render(**values)


# --- words ---------------------------------------------------------------------------------------


def current_step(run: WatchedRun) -> str:
    """Name the step that is working, failed, or was stopped, and its member; otherwise, the number
    of finished steps."""
    for part in reversed(run.parts):
        for step in part.steps:
            if step.state in ("working", "failed", "stopped"):
                return f"{part.name}: {step.name}" if part.name else step.name
    finished = sum(part.finished for part in run.parts)
    return f"{finished} steps" if finished != 1 else "1 step"


def share(work: Work) -> float:
    """The fraction of the work that is done, from 0 to 1."""
    return min(1.0, max(0.0, work.done / work.total)) if work.total > 0 else 0.0


def remaining(work: Work) -> str:
    """Describe how much is done, the rate, and the time left at that rate."""
    line = f"{text.percent(share(work))}: {work.done:,} of {work.total:,} {work.unit}"
    if work.done <= 0 or work.seconds <= 0:
        return line
    rate = work.done / work.seconds
    left = max(0.0, work.total - work.done) / rate
    return f"{line}, {text.digits(rate)}{text.NBSP}{work.unit}/s, {text.seconds(left)} left"


def _step_detail(step: StepProgress) -> str:
    if step.state == "reused":
        return f"reused (took {text.seconds(step.seconds)})"
    return text.seconds(step.seconds) if step.state in ("done", "failed") else step.state


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


# --- sections of the report ----------------------------------------------------------------------


def _sections(part: WatchedPart, kind: str) -> Iterator[Markup]:
    """Yield the curves of each training, and the metrics."""
    prefix = f"{part.name}-" if part.name else ""
    for number, training in enumerate(part.trainings):
        with suppress(OSError):  # its folder has just been renamed
            facts = training.metrics.stat()
            anchor = f"{prefix}training-{number}"
            yield _training_html(training, anchor, facts.st_mtime_ns, facts.st_size)
    if part.evaluation is not None:
        yield _section_html(_evaluation_section(kind, part.evaluation), f"{prefix}evaluation")


@lru_cache(maxsize=64)
def _training_html(training: Training, anchor: str, _changed: int, _size: int) -> Markup:
    """Render a training's section once per version of its file."""
    rows = read_metrics(training.metrics)
    if training.unit == "text":
        section = Section(training.title, charts=[*training_charts(rows, training.unit)])
    else:
        own: list[Chart] = [*own_text_charts(rows)]
        section = replace(
            training_section(rows, training.temperature),
            title=training.title,
            parts=[Section("Own text", charts=own)] if own else [],
        )
    return _section_html(section, anchor)


def _section_html(section: Section, anchor: str) -> Markup:
    """Render a section; empty for a section without data."""
    if section.is_empty:
        return Markup("")
    return Markup(_render("one_section.html.j2", section=section, anchor=anchor))


def _evaluation_section(kind: str, path: Path) -> Section:
    try:
        table = metrics_of(_EVALUATIONS[kind].load(path))
    except (StillhouseError, LookupError, TypeError):
        return Section("Evaluation", items=["The evaluation cannot be read."])
    return Section("Evaluation", table=table, items=list(table.notes))


def _members(path: Path) -> Markup:
    """Render the metrics of a family's members."""
    try:
        found = FamilyEvaluation.load(path)
    except StillhouseError:
        return Markup("")
    return _section_html(Section("Members", table=metrics_of(found)), "members")
