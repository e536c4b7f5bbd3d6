"""Draws charts as SVG. Equal data produces equal bytes.

Each chart is 430 points wide, so that its 12-point text is legible on a phone; the page puts two
side by side if there is room.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from stillhouse import number_format as text
from stillhouse.report.charts import (
    ACCENT,
    HEIGHT,
    INK,
    MUTED,
    RULE,
    BarChart,
    Chart,
    LineChart,
    MatrixChart,
)

WIDTH = 430 / 72
LABEL_GAP = 17.0
"""The vertical distance between two names, in points of the page."""
_INSIDE = 0.84 * WIDTH * 72, 0.72 * HEIGHT * 72
"""The approximate width and height of a chart's axes, in points of the page."""
OFF_SCALE = 2.5
"""A series that may be cut is drawn at the edge if it is this many times higher than the others."""

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
_LINE_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 2.2},
    "faint": {"linewidth": 1.0, "alpha": 0.3},
    "level": {"linewidth": 1.0, "linestyle": (0, (3, 3))},
    "measured": {
        "marker": "o",
        "markersize": 5.5,
        "linewidth": 1.0,
        "linestyle": (0, (3, 3)),
        "clip_on": False,
    },
    "joined": {"marker": "o", "markersize": 7},
    "dots": {"marker": "o", "markersize": 9, "linestyle": "", "clip_on": False},
    "diamond": {"marker": "D", "markersize": 7, "linestyle": "", "clip_on": False},
}


def draw(chart: Chart, key: str) -> str:
    """Render a chart as one <svg> element, with its text escaped. key: unique on the page."""
    with rc_context({**_STYLE, "svg.hashsalt": f"stillhouse-{key}"}):
        figure = Figure(figsize=(WIDTH, chart.height))
        FigureCanvasSVG(figure)
        ax = figure.add_subplot()
        match chart:
            case LineChart():
                _draw_lines(chart, ax)
            case BarChart():
                _draw_bars(chart, ax)
            case MatrixChart():
                _draw_matrix(chart, ax)
        buffer = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), key, chart.alt)


def _draw_lines(chart: LineChart, ax: Axes) -> None:
    ax.set(xlabel=chart.x_label, ylabel=chart.y_label)
    others = [y for line in chart.lines if not line.may_be_cut for y in line.y]
    limit = OFF_SCALE * max(others) if others and max(others) > 0 else math.inf
    named: list[_Named] = []
    for line in chart.lines:
        shown = [min(y, limit) if line.may_be_cut else y for y in line.y]
        style = _LINE_STYLES[line.style]
        if shown != line.y:
            style = {**style, "marker": "^"}
        ax.plot(line.x, shown, color=line.color, label=line.label or None, **style)
        for name, x, y, value in zip(line.names, line.x, shown, line.y, strict=False):
            cut = f": {text.digits(value)} ↑" if value > y else ""
            named.append(_Named(x, y, name + cut, 10.0 if line.style == "joined" else 0.0))
    if chart.log:
        _plain_log(ax, [value for line in chart.lines for value in line.y])
    ax.set_xlim(*chart.x_limits)
    ax.set_ylim(*chart.y_limits)
    if named:
        _name_points(ax, named)
    if any(line.label for line in chart.lines):
        ax.legend(frameon=False, fontsize=11, loc="upper right", labelcolor=MUTED)


def _draw_bars(chart: BarChart, ax: Axes) -> None:
    values, places = [bar.value for bar in chart.bars], range(len(chart.bars))
    drawn = ax.barh(places, values, color=[bar.color for bar in chart.bars], height=0.6)
    labels = [bar.text.replace(text.NBSP, " ") for bar in chart.bars]
    ax.bar_label(drawn, labels=labels, padding=5, fontsize=11, color=INK)
    ax.set_yticks(places, [bar.name for bar in chart.bars], color=INK)
    ax.invert_yaxis()
    ax.set(xlabel=chart.x_label, xlim=(0, max(values) * 1.38 or 1.0))
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def _draw_matrix(chart: MatrixChart, ax: Axes) -> None:
    shares = [[count / max(1, sum(line)) for count in line] for line in chart.counts]
    colors = LinearSegmentedColormap.from_list("share", ["#ffffff", ACCENT])
    ax.pcolormesh(shares, cmap=colors, vmin=0, vmax=1, edgecolors=RULE)
    for row, line in enumerate(chart.counts):
        for column, count in enumerate(line):
            if count:
                color = "white" if shares[row][column] > 0.55 else INK
                ax.text(column + 0.5, row + 0.5, str(count), ha="center", va="center",
                        fontsize=10, color=color)  # fmt: skip
    places = [place + 0.5 for place in range(len(chart.labels))]
    ax.set_xticks(places, chart.labels, rotation=45, ha="right")
    ax.set_yticks(places, chart.labels)
    ax.set(xlabel=chart.x_label, ylabel=chart.y_label)
    ax.invert_yaxis()
    ax.grid(visible=False)


class _Named(NamedTuple):
    """A point with a name. drop: how far to move the name down, away from a line, in points."""

    x: float
    y: float
    name: str
    drop: float


def _name_points(ax: Axes, points: Sequence[_Named]) -> None:
    """Write names next to the points, moved apart vertically if they would overlap."""
    (left, right), (low, high) = ax.dataLim.intervalx, ax.dataLim.intervaly
    x_room, y_room = 0.3 * ((right - left) or 0.1 * right or 1.0), 0.15 * ((high - low) or 1.0)
    ax.set(xlim=(left - x_room, right + x_room), ylim=(low - y_room, high + y_room))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    placed: list[tuple[float, float, float]] = []  # left, right and height of a name, in points
    for point in sorted(points, key=lambda point: point.y):
        on_right = point.x <= (left + right) / 2
        height = (point.y - low) / (high - low + 2 * y_room) * _INSIDE[1] - point.drop
        start = (point.x - left) / (right - left + 2 * x_room) * _INSIDE[0]
        ends = sorted((start, start + (1 if on_right else -1) * (9 + 6.5 * len(point.name))))
        above = [y + LABEL_GAP for a, b, y in placed if a < ends[1] and ends[0] < b]
        free = max([height, *above])
        placed.append((ends[0], ends[1], free))
        ax.annotate(
            point.name,
            (point.x, point.y),
            xytext=(9 if on_right else -9, free - height - point.drop),
            textcoords="offset points",
            ha="left" if on_right else "right",
            va="center",
            fontsize=11,
            color=INK,
        )


def _plain_log(ax: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis with plain numbers if values span more than a factor of six."""
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


def _inline(svg: str, key: str, alt: str) -> str:
    """Turn an SVG file into an element of a page, with unique ids, system fonts, and a name for
    screen readers."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", _FONTS, svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(alt, quote=True)}">{rest}'
