"""Every form of the model, teacher and checkpoint among them: quality against bytes and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from stillhouse.evaluate.results import ModelResult
from stillhouse.report import report_text as text
from stillhouse.report.charts import Chart, Point, scatter, short_unit, svg_chart
from stillhouse.report.palette import ACCENT, SECOND, role_color
from stillhouse.report.retention import speed_ratio


@dataclass(frozen=True)
class Form:
    """kl, top1_agreement: to the teacher, on the replay's tokens; of the full-precision student
    beside a quantized one, on all held-out tokens.

    speedup: decoding speed as a multiple of the float32 checkpoint's, each pair measured in turns
    in one process; None where it was not measured. tokens_per_s: where the replay measured it.
    """

    name: str
    bytes: float
    kl: float
    top1_agreement: float
    speedup: float | None
    tokens_per_s: float | None
    color: str


def forms(models: dict[str, ModelResult], replays: Sequence[dict[str, Any]]) -> list[Form]:
    """Teacher, what was exported, exports; none where replays did not know the teacher.

    The teacher's speed is the evaluation's multiple of the student's, both in one number type.
    """
    known = [replay for replay in replays if replay.get("teacher")]
    if not known:
        return []
    found = []
    teacher, student = models.get("teacher"), models.get("student")
    if teacher is not None:
        faster = speed_ratio(teacher, student, "decode_tokens_per_s") if student else None
        size = float(teacher.bytes_on_disk)
        found.append(Form("Teacher", size, 0.0, 1.0, faster, None, role_color("teacher")))
    if student is not None:
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
    student: ModelResult, rounded: ModelResult | None, replay: dict[str, Any]
) -> list[Form]:
    """What was exported: the float32 checkpoint; of a quantized student, that which is on the grid,
    with the bytes of its codes and scales, and before it the student in full precision.

    That one is not in the replay: its quality is the evaluation's, and its speed the checkpoint's,
    since both have the same shapes.
    """
    source = replay["source_teacher"]
    found = []
    name, size, color = "Checkpoint", 4.0 * student.parameters, ACCENT
    if rounded is not None:
        own = student.fidelity
        whole = float(student.bytes_on_disk)
        found.append(Form("Student", whole, own.kl, own.top1_agreement, 1.0, None, ACCENT))
        name, size = "On the grid", float(rounded.bytes_on_disk)
        color = role_color(rounded.role)
    speed = replay["source_decode_tokens_per_s"]
    found.append(Form(name, size, source["kl"], source["top1_agreement"], 1.0, speed, color))
    return found


def form_rows(found: Sequence[Form]) -> list[list[str]]:
    """Name, bytes, KL and top-1 agreement with the teacher, tokens a second, multiple."""
    return [
        [
            form.name,
            text.size(form.bytes),
            text.tiny(form.kl),
            text.percent(form.top1_agreement, 1),
            text.DASH if form.tokens_per_s is None else text.digits(form.tokens_per_s),
            text.DASH if form.speedup is None else f"{text.digits(form.speedup)} ×",
        ]
        for form in found
    ]


def form_charts(found: Sequence[Form]) -> list[Chart]:
    """KL to the teacher against bytes, and against speed; the bottom is better."""
    if len(found) < 2:
        return []
    unit, scale = short_unit(max(form.bytes for form in found))
    axis = f"{unit} of bytes" if unit else "bytes"
    charts = [_chart("bytes", "Quality against bytes", axis, [(f, f.bytes / scale) for f in found])]
    timed = [(form, form.speedup) for form in found if form.speedup is not None]
    if len(timed) > 1:
        axis = "decoding speed (1: the float32 checkpoint)"
        charts.append(_chart("form-speed", "Quality against decoding speed", axis, timed))
    return charts


def _chart(key: str, title: str, axis: str, placed: Sequence[tuple[Form, float]]) -> Chart:
    points = [Point(form.name, x, form.kl, form.name, form.color) for form, x in placed]
    told = " ".join(
        f"{form.name}: {text.digits(x)}, {text.tiny(form.kl)} nats a token." for form, x in placed
    )

    def draw(ax: Axes) -> None:
        scatter(ax, points, axis, "KL to the teacher (nats a token)", down=True)

    return svg_chart(key, title, f"KL to the teacher against {axis}. {told}", draw)
