"""Charts as plain data, which draw_charts.py renders, and the colors of charts and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from stillhouse import number_format as text

INK = "#1c2430"
MUTED = "#5b6675"
RULE = "#dfe3e8"
ACCENT = "#b3541e"
PALE = "#e3b99f"
SECOND = "#2b7a78"

_ROLES = {
    "teacher": "#47546b",
    "student": ACCENT,
    "untrained": "#9aa3b0",
    "cut": "#c3c9d1",
    "fine_tuned": SECOND,
    "quantized": "#7a5ba6",
    "quantized_trained": "#4b3f8f",
}


def role_color(role: str) -> str:
    return _ROLES.get(role, MUTED)


HEIGHT = 282 / 72
"""The height of a line chart in inches."""

Limits = tuple[float | None, float | None]


@dataclass(frozen=True)
class Line:
    """A series of points, joined or separate.

    label: its name in the legend. names: labels written next to the points. may_be_cut: whether to
    draw the series at the upper edge if it is far above the others.
    """

    x: list[float]
    y: list[float]
    color: str
    label: str = ""
    style: Literal["line", "faint", "level", "measured", "joined", "dots", "diamond"] = "line"
    names: list[str] = field(default_factory=list)
    may_be_cut: bool = False


@dataclass(frozen=True)
class LineChart:
    """A line or scatter chart. log: whether to use a logarithmic y axis if values span more than a
    factor of six; otherwise it starts at 0."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    log: bool = False
    x_limits: Limits = (None, None)
    y_limits: Limits = (None, None)
    kind: Literal["lines"] = "lines"

    height = HEIGHT

    @property
    def alt(self) -> str:
        parts = []
        for line in self.lines:
            label = f"{line.label}: " if line.label else ""
            if not line.names:
                parts.append(f"{label}{text.tiny(line.y[0])} to {text.tiny(line.y[-1])}")
            for name, x, y in zip(line.names, line.x, line.y, strict=False):
                parts.append(f"{label}{name}: {text.digits(x)}, {text.tiny(y)}")
        return f"{self.y_label} against {self.x_label}. {'; '.join(parts)}."


@dataclass(frozen=True)
class Bar:
    """One bar. text: the value as written next to the bar."""

    name: str
    value: float
    text: str
    color: str = ACCENT


@dataclass(frozen=True)
class BarChart:
    """A chart of horizontal bars, the first at the top."""

    title: str
    x_label: str
    bars: list[Bar]
    kind: Literal["bars"] = "bars"

    @property
    def height(self) -> float:
        return (80 + 36 * len(self.bars)) / 72

    @property
    def alt(self) -> str:
        return f"{self.title}: {', '.join(f'{bar.name} {bar.text}' for bar in self.bars)}."


@dataclass(frozen=True)
class MatrixChart:
    """A matrix of counts, [row][column]. A cell's color is its share of the row."""

    title: str
    x_label: str
    y_label: str
    labels: list[str]
    counts: list[list[int]]
    kind: Literal["matrix"] = "matrix"

    @property
    def height(self) -> float:
        return (110 + 30 * len(self.labels)) / 72

    @property
    def alt(self) -> str:
        right = sum(line[place] for place, line in enumerate(self.counts))
        errors = "".join(
            f" {row} mistaken for {column}: {count}." for row, column, count in self.errors()[:15]
        )
        return f"{self.title}: {right} of {sum(map(sum, self.counts))} on the diagonal.{errors}"

    def errors(self) -> list[tuple[str, str, int]]:
        """Return the off-diagonal (row, column, count) triples, most frequent first."""
        found = [
            (self.labels[row], self.labels[column], count)
            for row, line in enumerate(self.counts)
            for column, count in enumerate(line)
            if row != column and count
        ]
        return sorted(found, key=lambda one: -one[2])


Chart = LineChart | BarChart | MatrixChart


def dot(name: str, x: float, y: float, color: str, *, may_be_cut: bool = False) -> Line:
    """Make a series with one named point."""
    return Line([x], [y], color, style="dots", names=[name], may_be_cut=may_be_cut)


def in_units(values: Sequence[float], name: str) -> tuple[list[float], str]:
    """Convert large values to thousands, millions, or billions; also return the axis label."""
    for scale, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if max(values) >= 2 * scale:
            return [value / scale for value in values], f"{name} ({unit})"
    return list(values), name


def in_powers(values: Sequence[float], name: str) -> tuple[list[float], str]:
    """Divide the values by the largest value's power of ten; also return the axis label."""
    exponent = math.floor(math.log10(max(values)))
    label = f"{name} (×{text.NBSP}10{text.superscript(exponent)})"
    return [value / 10**exponent for value in values], label
