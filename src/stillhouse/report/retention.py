"""The retention table: measures of every model, as percent of the teacher where that is fair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stillhouse.evaluate.results import ModelResult
from stillhouse.report import report_text as text
from stillhouse.report.palette import role_color, role_name


@dataclass(frozen=True)
class Cell:
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Row:
    """`note`: key of the footnote that defines the measure."""

    name: str
    cells: list[Cell]
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Column:
    role: str
    name: str
    color: str


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    rows: list[Row]


def retention_table(models: dict[str, ModelResult]) -> Table | None:
    if not models:
        return None
    columns = [Column(role, role_name(role), role_color(role)) for role in models]
    results = list(models.values())
    teacher = models.get("teacher")
    untrained = models.get("untrained")
    rows = [
        _row(
            "Top-1 agreement", results, lambda m: m.fidelity.top1_agreement, _percent, note="top1"
        ),
        Row(
            "KL to the teacher",
            [Cell(text.tiny(m.fidelity.kl), _gap_closed(m, untrained)) for m in results],
            "nats a token",
            "kl",
        ),
        Row(
            "Perplexity",
            [
                Cell(text.digits(m.fidelity.perplexity), _perplexity_kept(m, teacher))
                for m in results
            ],
            "held-out text",
            "perplexity",
        ),
        _row(
            "Calibration error",
            results,
            lambda m: m.fidelity.calibration_error,
            lambda value: text.percent(value, 1),
            note="ece",
        ),
    ]
    rows += _task_rows(results, teacher)
    rows += [
        _row("Parameters", results, lambda m: m.parameters, text.count, teacher),
        _row(
            "Non-embedding parameters",
            results,
            lambda m: m.non_embedding_parameters,
            text.count,
            teacher,
        ),
        _row("Size on disk", results, lambda m: m.bytes_on_disk, text.size, teacher, note="disk"),
        _speed_row("Prefill", results, "prefill_tokens_per_s", text.digits, teacher, "tokens/s"),
        _speed_row("Decoding", results, "decode_tokens_per_s", text.digits, teacher, "tokens/s"),
        _speed_row("Peak memory", results, "peak_memory_bytes", text.size, teacher, ""),
    ]
    return Table(columns, [row for row in rows if any(c.value != text.DASH for c in row.cells)])


def _percent(share: float) -> str:
    return text.percent(share, 1)


def _row(
    name: str,
    models: Sequence[ModelResult],
    value: Callable[[ModelResult], float],
    show: Callable[[float], str],
    teacher: ModelResult | None = None,
    *,
    unit: str = "",
    note: str = "",
) -> Row:
    """One measure that all models have; with `teacher`, also as percent of the teacher's."""
    cells = []
    for model in models:
        share = ""
        if teacher is not None and model is not teacher and value(teacher):
            share = f"{text.percent(value(model) / value(teacher))} of teacher"
        cells.append(Cell(show(value(model)), share))
    return Row(name, cells, unit, note)


def _speed_row(
    name: str,
    models: Sequence[ModelResult],
    key: str,
    show: Callable[[float], str],
    teacher: ModelResult | None,
    unit: str,
) -> Row:
    cells = []
    for model in models:
        if model.speed is None or not getattr(model.speed, key):
            cells.append(Cell(text.DASH))
            continue
        ratio = None if teacher is None or model is teacher else speed_ratio(model, teacher, key)
        share = "" if ratio is None else f"{text.percent(ratio)} of teacher"
        cells.append(Cell(show(getattr(model.speed, key)), share))
    return Row(name, cells, unit, "speed")


def _task_rows(models: Sequence[ModelResult], teacher: ModelResult | None) -> list[Row]:
    rows = []
    for task in dict.fromkeys(name for model in models for name in model.tasks):
        cells = []
        for model in models:
            score = model.tasks.get(task)
            share = ""
            if score is not None and teacher and model is not teacher and teacher.tasks.get(task):
                share = f"{text.percent(score / teacher.tasks[task])} of teacher"
            cells.append(Cell(text.DASH if score is None else text.digits(score), share))
        rows.append(Row(task, cells, "", "task"))
    return rows


def speed_ratio(model: ModelResult, teacher: ModelResult, key: str) -> float | None:
    if model.speed is None or teacher.speed is None or not getattr(teacher.speed, key):
        return None
    return float(getattr(model.speed, key)) / float(getattr(teacher.speed, key))


def _gap_closed(model: ModelResult, untrained: ModelResult | None) -> str:
    if untrained is None or model.role in ("teacher", "untrained") or untrained.fidelity.kl <= 0:
        return ""
    return f"{text.percent(1 - model.fidelity.kl / untrained.fidelity.kl)} of the gap closed"


def _perplexity_kept(model: ModelResult, teacher: ModelResult | None) -> str:
    if teacher is None or model is teacher:
        return ""
    kept = teacher.fidelity.perplexity / model.fidelity.perplexity
    return f"{text.percent(kept)} of teacher"
