"""Compares all forms of the model, including the teacher and the checkpoint: quality against bytes
and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse import number_format as text
from stillhouse.evaluation.metrics_table import MetricsTable
from stillhouse.evaluation.results import ModelResult
from stillhouse.report.charts import ACCENT, SECOND, Chart, LineChart, dot, in_units, role_color
from stillhouse.report.page import Section

Replays = Sequence[Mapping[str, Any]]
KL_LABEL = "KL to the teacher (nats/token)"


@dataclass(frozen=True)
class Form:
    """One form of the model.

    kl, top1_agreement: compared with the teacher on the replay's tokens, except that a
    full-precision student shown with a quantized one is compared on all held-out tokens. speedup:
    decoding speed as a multiple of the float32 checkpoint's, each pair measured alternately in one
    process; None if not measured. tokens_per_s: None if the replay did not measure it.
    """

    name: str
    bytes: float
    kl: float
    top1_agreement: float
    speedup: float | None
    tokens_per_s: float | None
    color: str


def forms(models: Mapping[str, ModelResult], replays: Replays) -> list[Form]:
    """Return the teacher, the exported model, and the exports; empty if the replays have no teacher
    to compare with.

    The teacher's speed is its multiple of the student's in the evaluation, at the same dtype.
    """
    known = [replay for replay in replays if replay.get("teacher")]
    if not known:
        return []
    teacher, student = models["teacher"], models["student"]
    faster, size = teacher.decoding_speedup(student), float(teacher.bytes_on_disk)
    found = [Form("Teacher", size, 0.0, 1.0, faster, None, role_color("teacher"))]
    rounded = models.get("quantized_trained") or models.get("quantized")
    found += _sources(student, rounded, known[0])
    for replay in known:
        speed, beside = replay["decode_tokens_per_s"], replay["source_decode_tokens_per_s"]
        found.append(
            Form(
                replay["format"],
                float(replay["bytes"]),
                replay["teacher"]["kl"],
                replay["teacher"]["top1_agreement"],
                speed / beside if speed and beside else None,
                speed,
                SECOND,
            )
        )
    return found


def _sources(
    student: ModelResult, rounded: ModelResult | None, replay: Mapping[str, Any]
) -> list[Form]:
    """Return the exported model: the float32 checkpoint, or for a quantized student the
    full-precision student followed by the one on the grid, with the bytes of its codes and scales.

    The full-precision student is not in the replay: its quality comes from the evaluation, and its
    speed equals the checkpoint's, since both have the same shapes.
    """
    source = replay["source_teacher"]
    found = []
    name, size, color = "Checkpoint", 4.0 * student.parameters, ACCENT
    if rounded is not None:
        own = student.fidelity
        size_bytes = float(student.bytes_on_disk)
        found.append(Form("Student", size_bytes, own.kl, own.top1_agreement, 1.0, None, ACCENT))
        name, size = "On the grid", float(rounded.bytes_on_disk)
        color = role_color(rounded.role)
    speed = replay["source_decode_tokens_per_s"]
    found.append(Form(name, size, source["kl"], source["top1_agreement"], 1.0, speed, color))
    return found


def forms_section(found: Sequence[Form]) -> Section:
    """Build the section on quality against bytes and speed, with a table and charts."""
    lead = (
        "Quality is relative to the teacher, on the replay’s tokens (on all held-out tokens for a "
        "full-precision student shown with a quantized one). Speed is measured in the format’s own "
        "runtime, alternating with the float32 checkpoint; a dash means not measured."
    )
    title = "Quality against bytes and speed"
    if not found:
        return Section(title)
    return Section(title, lead=lead, table=form_table(found), charts=form_charts(found))


def form_table(found: Sequence[Form]) -> MetricsTable:
    heads = ["Form", "Size", KL_LABEL, "Top-1 agreement", "Decoding (tokens/s)",
             "Relative to the checkpoint"]  # fmt: skip
    rows = [
        [
            form.name,
            text.size(form.bytes),
            text.tiny(form.kl),
            text.percent(form.top1_agreement, 1),
            text.DASH if form.tokens_per_s is None else text.digits(form.tokens_per_s),
            text.DASH if form.speedup is None else text.times(form.speedup),
        ]
        for form in found
    ]
    return MetricsTable.of_text(heads, rows)


def form_charts(found: Sequence[Form]) -> list[Chart]:
    """Chart KL to the teacher, where lower is better, against bytes and against speed."""
    sizes, label = in_units([form.bytes for form in found], "bytes")
    charts: list[Chart] = [_chart("Quality against bytes", label, found, sizes)]
    timed = [form for form in found if form.speedup is not None]
    if len(timed) > 1:
        label = "decoding speed (1 = the float32 checkpoint)"
        speeds = [form.speedup or 0.0 for form in timed]
        charts.append(_chart("Quality against decoding speed", label, timed, speeds))
    return charts


def _chart(title: str, axis: str, found: Sequence[Form], xs: Sequence[float]) -> LineChart:
    dots = [dot(f.name, x, f.kl, f.color) for f, x in zip(found, xs, strict=True)]
    return LineChart(title, axis, KL_LABEL, dots)
