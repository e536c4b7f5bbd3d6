"""The report's charts as SVG text: the same data give the same bytes, and nothing is loaded.

Each chart is drawn at 430 points' width, so that its 12-point text is still read at the width of a
phone; the page puts two side by side where there is room.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from stillhouse.evaluate.results import ModelResult
from stillhouse.report import report_text as text
from stillhouse.report.history import Curve
from stillhouse.report.palette import ACCENT, INK, MUTED, RULE, role_color, role_name
from stillhouse.report.report_data import StageCost

WIDTH, HEIGHT = 430 / 72, 282 / 72
LABEL_GAP = 17.0
"""Points between two labels of a scatter chart."""
OFF_SCALE = 2.5
"""An untrained student this many times worse than the others is drawn at the chart's edge."""

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": "#b6bdc7",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Chart:
    """svg: a whole <svg> element, its text escaped. alt: what it shows, in words."""

    title: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Point:
    """name, color: None: those of the role."""

    role: str
    x: float
    y: float
    name: str | None = None
    color: str | None = None


def training_chart(curve: Curve) -> Chart:
    """Training measure against tokens: every step faint, smoothed over it, held-out as points."""
    train_x, train_y = curve.tokens, curve.values

    def draw(ax: Axes) -> None:
        unit, scale = short_unit(max([*train_x, *curve.heldout_tokens]))
        x = [value / scale for value in train_x]
        ax.plot(x, train_y, color=ACCENT, alpha=0.28, linewidth=1.0, label="each step")
        ax.plot(x, curve.smoothed, color=ACCENT, linewidth=2.2, label="smoothed")
        if curve.heldout:
            ax.plot(
                [value / scale for value in curve.heldout_tokens],
                curve.heldout,
                color=INK,
                marker="o",
                markersize=5.5,
                linewidth=1.0,
                linestyle=(0, (3, 3)),
                clip_on=False,
                label="held-out text" if curve.same_measure else "held-out KL",
            )
        _plain_log(ax, [*train_y, *curve.heldout])
        ax.set_xlim(left=0)
        ax.set_xlabel(f"training tokens ({unit})" if unit else "training tokens")
        ax.set_ylabel(f"{curve.name} (nats a token)")
        ax.legend(frameon=False, fontsize=11, loc="upper right", labelcolor=MUTED)

    alt = (
        f"{curve.name} over {text.count(train_x[-1])} training tokens: smoothed, it goes from "
        f"{text.digits(curve.smoothed[0])} to {text.digits(curve.smoothed[-1])} nats a token."
    )
    if curve.heldout:
        alt += (
            f" On held-out text it is {text.digits(curve.heldout[0])} at the first measurement and "
            f"{text.digits(curve.heldout[-1])} at the last."
        )
    return svg_chart("training", f"{curve.name} against tokens", alt, draw)


def gradient_chart(
    tokens: Sequence[float], norms: Sequence[float], smooth: Sequence[float]
) -> Chart:
    """The gradient's norm before clipping, against tokens."""

    def draw(ax: Axes) -> None:
        unit, scale = short_unit(max(tokens))
        x = [value / scale for value in tokens]
        ax.plot(x, norms, color=MUTED, alpha=0.35, linewidth=1.0)
        ax.plot(x, smooth, color=MUTED, linewidth=2.2)
        _plain_log(ax, norms)
        ax.set_xlim(left=0)
        ax.set_xlabel(f"training tokens ({unit})" if unit else "training tokens")
        ax.set_ylabel("norm of the gradient (no unit)")

    alt = (
        f"Norm of the gradient before clipping: at most {text.digits(max(norms))}, "
        f"{text.digits(smooth[-1])} at the end."
    )
    return svg_chart("gradient", "Gradient norm", alt, draw)


def size_chart(models: Sequence[ModelResult]) -> Chart:
    """KL to the teacher against parameters; nearer to the bottom left is better."""
    unit, scale = short_unit(max(m.parameters for m in models))
    points = [Point(m.role, m.parameters / scale, m.fidelity.kl) for m in models]
    alt = "KL divergence to the teacher against parameters. " + " ".join(
        f"{role_name(m.role)}: {text.count(m.parameters)} parameters, "
        f"{text.tiny(m.fidelity.kl)} nats a token."
        for m in models
    )

    def draw(ax: Axes) -> None:
        x_label = f"parameters ({unit})" if unit else "parameters"
        scatter(ax, points, x_label, "KL to the teacher (nats a token)", down=True)

    return svg_chart("size", "Quality against size", alt, draw)


def speed_chart(models: Sequence[ModelResult]) -> Chart | None:
    """Top-1 agreement against decoding speed; nearer to the top right is better."""
    timed = [(m, m.speed) for m in models if m.speed is not None]
    if len(timed) < 2:
        return None
    points = [
        Point(m.role, s.decode_tokens_per_s, 100 * m.fidelity.top1_agreement) for m, s in timed
    ]
    alt = "Top-1 agreement with the teacher against decoding speed. " + " ".join(
        f"{role_name(m.role)}: {text.percent(m.fidelity.top1_agreement, 1)} at "
        f"{text.digits(s.decode_tokens_per_s)} tokens a second."
        for m, s in timed
    )

    def draw(ax: Axes) -> None:
        scatter(ax, points, "decoding speed (tokens/s)", "top-1 agreement (%)", down=False)

    return svg_chart("speed", "Quality against speed", alt, draw)


def stage_charts(stages: Sequence[StageCost]) -> list[Chart]:
    """Horizontal bars of each stage: seconds, and FLOPs, where any stage has some."""
    charts = []
    for key, title, unit, show in (
        ("seconds", "Time by stage", "seconds", text.seconds),
        ("flops", "Computation by stage", "FLOPs", text.flops),
    ):
        rows = [(stage, float(getattr(stage, key))) for stage in stages]
        if any(value > 0 for _, value in rows):
            charts.append(_bars(key, title, unit, rows, show))
    return charts


def _bars(
    key: str,
    title: str,
    unit: str,
    rows: Sequence[tuple[StageCost, float]],
    show: Callable[[float], str],
) -> Chart:
    values = [value for _, value in rows]
    names = [f"{stage.name} (reused)" if stage.reused else stage.name for stage, _ in rows]

    def draw(ax: Axes) -> None:
        colors = ["#e3b99f" if stage.reused else ACCENT for stage, _ in rows]
        bars = ax.barh(range(len(rows)), values, color=colors, height=0.62)
        labels = [show(value).replace(text.NBSP, " ") for value in values]
        ax.bar_label(bars, labels=labels, padding=5, fontsize=11, color=INK)
        ax.set_yticks(range(len(rows)), names, color=INK)
        ax.invert_yaxis()
        ax.set_xlim(0, max(values) * 1.38)
        ax.grid(axis="y", visible=False)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlabel(unit)
        if key == "flops":
            _powers_of_ten(ax, max(values))

    listed = ", ".join(f"{name} {show(value)}" for name, value in zip(names, values, strict=True))
    height = (70 + 34 * len(rows)) / 72
    return svg_chart(key, title, f"{title}: {listed}.", draw, height=height)


def _powers_of_ten(ax: Axes, top: float) -> None:
    exponent = math.floor(math.log10(top))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**exponent:g}"))
    ax.set_xlabel(f"floating-point operations (×{text.power_of_ten(10**exponent)[6:]})")


def scatter(ax: Axes, points: Sequence[Point], x_label: str, y_label: str, *, down: bool) -> None:
    """Points with their names. `down`: small y is better, and a far-off untrained point is cut."""
    limit = _cut(points) if down else math.inf
    shown = [replace(p, y=min(p.y, limit)) for p in points]
    xs, ys = [p.x for p in shown], [p.y for p in shown]
    x_room = (max(xs) - min(xs)) or 0.1 * max(xs) or 1.0
    y_room = (max(ys) - min(ys)) or 1.0
    ax.set_xlim(min(xs) - 0.5 * x_room, max(xs) + 0.5 * x_room)
    ax.set_ylim(min(ys) - 0.14 * y_room, max(ys) + 0.16 * y_room)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    for original, point in zip(points, shown, strict=True):
        marker = "^" if original.y > limit else "o"
        color = point.color or role_color(point.role)
        ax.plot(point.x, point.y, marker, color=color, markersize=9, clip_on=False)
    _name_points(ax, points, shown, limit)


def _cut(points: Sequence[Point]) -> float:
    """The y beyond which an untrained student is drawn at the edge, for the others' sake."""
    others = [p.y for p in points if p.role != "untrained"]
    return OFF_SCALE * max(others) if others and max(others) > 0 else math.inf


def _name_points(ax: Axes, points: Sequence[Point], shown: Sequence[Point], limit: float) -> None:
    """Labels beside the points, moved apart vertically where they would overlap."""
    span = HEIGHT * 72 * 0.72
    low, high = ax.get_ylim()
    left, right = ax.get_xlim()
    placed: dict[bool, list[float]] = {True: [], False: []}
    order = sorted(range(len(shown)), key=lambda index: shown[index].y)
    for index in order:
        point, original = shown[index], points[index]
        on_right = point.x < (left + right) / 2
        height = (point.y - low) / (high - low) * span
        free = max([height, *(other + LABEL_GAP for other in placed[on_right])])
        placed[on_right].append(free)
        name = point.name or role_name(point.role)
        if original.y > limit:
            name += f": {text.digits(original.y)} ↑"
        ax.annotate(
            name,
            (point.x, point.y),
            xytext=(9 if on_right else -9, free - height),
            textcoords="offset points",
            ha="left" if on_right else "right",
            va="center",
            fontsize=11,
            color=INK,
        )


def _plain_log(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, where values span more than a factor of six."""
    if min(values) <= 0 or max(values) / min(values) < 6:
        ax.set_ylim(bottom=0)
        return
    ax.set_yscale("log")
    ticks = [
        lead * 10.0**exponent
        for exponent in range(-6, 7)
        for lead in (1, 2, 5)
        if 0.9 * min(values) <= lead * 10.0**exponent <= 1.1 * max(values)
    ]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.yaxis.set_minor_formatter(NullFormatter())


def short_unit(top: float) -> tuple[str, float]:
    """The name and size of the unit in which `top` is a short number."""
    for scale, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if top >= 2 * scale:
            return name, scale
    return "", 1.0


def svg_chart(
    key: str, title: str, alt: str, draw: Callable[[Axes], None], *, height: float = HEIGHT
) -> Chart:
    with rc_context({**_STYLE, "svg.hashsalt": f"stillhouse-{key}"}):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Chart(title, _inline(buffer.getvalue(), key, alt), alt)


def _inline(svg: str, key: str, alt: str) -> str:
    """A file's SVG as an element of a page: own ids, system fonts, a name for screen readers."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", _FONTS, svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(width|height)="[^"]*"', "", opening)
    label = escape(alt, quote=True)
    return f'{opening} role="img" aria-label="{label}">{rest}'
