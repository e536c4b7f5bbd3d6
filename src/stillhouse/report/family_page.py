"""The page about a family: quality against size for every member, and what each hop cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from stillhouse.evaluate.results import Generation, ModelResult
from stillhouse.report import report_text as text
from stillhouse.report.charts import Chart, short_unit, svg_chart
from stillhouse.report.palette import ACCENT, MUTED, role_color, role_name
from stillhouse.report.write import environment, write_page


@dataclass(frozen=True)
class Member:
    """One student. untrained: as it was pruned. shape: sizes before and after, of what was cut.
    report: its own page. tokens, flops, seconds: of what was done for it alone. decoding: its
    speed over the teacher's in the same run, where that was measured. quantized: as it is shipped,
    where that is in few bits."""

    name: str
    untrained: ModelResult
    student: ModelResult
    shape: dict[str, tuple[int, int]]
    report: str
    tokens: int
    flops: int
    seconds: float
    decoding: float | None = None
    quantized: ModelResult | None = None

    @property
    def recovered(self) -> float:
        """The share of the pruning's KL that training took back."""
        before, after = self.untrained.fidelity.kl, self.student.fidelity.kl
        return 1.0 - after / before if before > 0 else 0.0


@dataclass(frozen=True)
class CutTeacher:
    """What losing tokens made of the teacher, before and after. perplexity: on training text that
    has lost none of them; None where there was none."""

    tokens: tuple[int, int]
    parameters: tuple[int, int]
    perplexity: tuple[float, float] | None


@dataclass(frozen=True)
class ScratchMember:
    """Tokens from random weights to a member's KL, with a 90 % interval of the fit.

    extrapolated: how many times further than was measured. flops_a_token: with the teacher's.
    """

    name: str
    tokens: float
    low: float
    high: float
    extrapolated: float
    flops_a_token: int


@dataclass(frozen=True)
class FromScratch:
    """points: measured (tokens, held-out KL); KL = scale · tokens^(-exponent) is fitted to them.
    rate: FLOPs a second of the training that was measured."""

    members: Sequence[ScratchMember]
    tokens: int
    points: Sequence[tuple[int, float]]
    exponent: float
    scale: float
    rate: float

    def flops(self, which: Literal["tokens", "low", "high"] = "tokens") -> float:
        """Of all members."""
        return sum(getattr(member, which) * member.flops_a_token for member in self.members)


@dataclass(frozen=True)
class FamilyReport:
    """members: the largest first. chained: each was pruned from the one before it. learned_from:
    as cascade.teacher. watts: assumed of the machine, for the energy. cut: where the teacher, whose
    measures are given, had lost tokens itself."""

    title: str
    teacher: ModelResult
    members: Sequence[Member]
    chained: bool
    generations: Sequence[Generation] = ()
    learned_from: str = "original"
    scratch: FromScratch | None = None
    watts: float = 0.0
    cut: CutTeacher | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def write_family_report(report: FamilyReport, path: Path) -> None:
    """One offline HTML page. Raises RunError where it cannot be written."""
    write_page(render_family_report(report), path)


def render_family_report(report: FamilyReport) -> str:
    heads, rows = _measured([list(COLUMNS), *_rows(report)])
    template = environment().get_template("family.html.j2")
    return template.render(
        report=report,
        headline=_headline(report),
        cut=None if report.cut is None else _cut(report.cut),
        heads=heads,
        rows=rows,
        charts=[size_chart(report), *speed_charts(report), recovery_chart(report)],
        totals=_totals(report),
        scratch=None if report.scratch is None else _scratch(report, report.scratch),
        columns=["teacher", *(member.name for member in report.members)],
    )


def _headline(report: FamilyReport) -> str:
    last = report.members[-1]
    cut = "" if report.cut is None else "cut "
    whole = report.cut.parameters[0] if report.cut else report.teacher.parameters
    share = last.student.parameters / whole
    names = f"{len(report.members)} students" if len(report.members) > 1 else "One student"
    return (
        f"{names}, down to {text.percent(share)} of the teacher’s parameters; the smallest has "
        f"the {cut}teacher’s likeliest next token in "
        f"{text.percent(last.student.fidelity.top1_agreement, 1)} of places."
    )


def _cut(cut: CutTeacher) -> str:
    (tokens, left), (whole, parameters) = cut.tokens, cut.parameters
    sentence = (
        f"The teacher here has {left:,} of its {tokens:,} tokens, and {text.count(parameters)} of "
        f"{text.count(whole)} parameters; all measures are against it."
    )
    if cut.perplexity is not None:
        before, after = map(text.digits, cut.perplexity)
        sentence += (
            f" On training text that has lost none of its tokens its perplexity is {after}, where "
            f"the whole teacher’s is {before}; other text takes more tokens than before."
        )
    return sentence


def _rows(report: FamilyReport) -> list[list[str]]:
    rows = [
        [
            "Teacher, cut" if report.cut else "Teacher",
            "",
            *_measures(report.teacher, 1.0),
            "",
            "",
            "",
        ]
    ]
    for member in report.members:
        rows.append(
            [
                member.name,
                ", ".join(f"{text.label(k)} {b:,} → {a:,}" for k, (b, a) in member.shape.items()),
                *_measures(member.student, member.decoding),
                text.digits(member.untrained.fidelity.kl),
                text.percent(member.recovered),
                text.seconds(member.seconds),
            ]
        )
        if member.quantized is not None:
            name = f"{member.name}, {role_name(member.quantized.role).removeprefix('Student, ')}"
            rows.append([name, "", *_measures(member.quantized, None), "", "", ""])
    return rows


def _measured(table: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows, without columns that have nothing in them."""
    heads, *rows = table
    kept = [at for at in range(len(heads)) if any(row[at] for row in rows)]
    heads, *rows = ([row[at] for at in kept] for row in table)
    return heads, rows


COLUMNS = (
    "Member",
    "Cut here",
    "Parameters",
    "Size",
    "KL",
    "Top-1",
    "Perplexity",
    "Decoding",
    "Memory",
    "KL as pruned",
    "Recovered",
    "Time",
)


def _measures(model: ModelResult, decoding: float | None) -> list[str]:
    fidelity, speed = model.fidelity, model.speed
    return [
        text.count(model.parameters),
        text.size(model.bytes_on_disk),
        text.tiny(fidelity.kl),
        text.percent(fidelity.top1_agreement, 1),
        text.digits(fidelity.perplexity),
        f"{decoding:.2f} ×" if speed and decoding else "",
        text.size(speed.peak_memory_bytes) if speed else "",
    ]


def _totals(report: FamilyReport) -> list[tuple[str, str]]:
    members = report.members
    seconds = sum(member.seconds for member in members)
    totals = [
        ("Training tokens", text.count(sum(member.tokens for member in members))),
        ("Computation", text.flops(sum(member.flops for member in members))),
        ("Time", text.seconds(seconds)),
    ]
    if report.watts:
        energy = f"{seconds * report.watts / 3.6e6:.2g} kWh, at an assumed {report.watts:,.0f} W"
        totals.append(("Energy", energy))
    return totals


def _scratch(report: FamilyReport, scratch: FromScratch) -> dict[str, Any]:
    """What the page says about training from random weights."""
    family = sum(member.flops for member in report.members)
    rows = [
        (
            member.name,
            text.digits(report_member.student.fidelity.kl),
            f"{text.count(round(member.tokens))} ({text.count(round(member.low))} to "
            f"{text.count(round(member.high))})",
            text.flops(round(member.tokens * member.flops_a_token)),
            *_time_and_energy(report, member.tokens * member.flops_a_token / scratch.rate),
            "measured"
            if member.extrapolated <= 1
            else f"{text.ratio(member.extrapolated)} × beyond",
        )
        for member, report_member in zip(scratch.members, report.members, strict=True)
    ]
    times = [scratch.flops(which) / family for which in ("tokens", "low", "high")]
    return {
        "rows": rows,
        "times": list(map(text.ratio, times)),
        "rate": f"{text.digits(scratch.rate / 1e9)}{text.NBSP}GFLOP/s",
        "chart": scratch_chart(report, scratch),
    }


def _time_and_energy(report: FamilyReport, seconds: float) -> tuple[str, str]:
    """At the rate that was measured, and the power that is assumed."""
    energy = f"{seconds * report.watts / 3.6e6:.2g} kWh" if report.watts else ""
    return text.long_time(seconds), energy


def scratch_chart(report: FamilyReport, scratch: FromScratch) -> Chart:
    """Held-out KL against tokens: measured, fitted, and where the members are."""
    measured = list(zip(*scratch.points, strict=True))
    furthest = max(scratch.points[-1][0], *(member.tokens for member in scratch.members))

    def draw(ax: Axes) -> None:
        ends = np.geomspace(scratch.points[0][0], furthest, 50)
        ax.plot(ends, scratch.scale * ends**-scratch.exponent, "--", color=MUTED, label="fitted")
        ax.plot(*measured, "o", color=role_color("untrained"), label="measured")
        for member, found in zip(report.members, scratch.members, strict=True):
            kl = member.student.fidelity.kl
            ax.plot([found.low, found.high], [kl, kl], "-", color=ACCENT, linewidth=3)
            ax.annotate(
                member.name, (found.low, kl), xytext=(-6, 0), ha="right", va="center",
                textcoords="offset points", fontsize=11, color=MUTED,
            )  # fmt: skip
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("training tokens from random weights")
        ax.set_ylabel("KL to the teacher (nats a token)")
        ax.legend(frameon=False, fontsize=11, labelcolor=MUTED)

    alt = (
        f"KL from random weights: {scratch.points[-1][1]:.2f} after "
        f"{text.count(scratch.points[-1][0])} tokens. "
        + " ".join(f"{m.name}: {text.count(round(m.tokens))} tokens." for m in scratch.members)
    )
    return svg_chart("family-scratch", "From random weights", alt, draw)


def size_chart(report: FamilyReport) -> Chart:
    """KL against parameters: the members as a line, as pruned and as trained."""
    members = report.members
    unit, scale = short_unit(report.teacher.parameters)
    x = [member.student.parameters / scale for member in members]

    def draw(ax: Axes) -> None:
        for role, label in (("untrained", "as pruned"), ("student", "distilled")):
            y = [getattr(member, role).fidelity.kl for member in members]
            ax.plot(x, y, "o-", color=role_color(role), markersize=7, label=label)
        ax.plot(report.teacher.parameters / scale, 0, "D", color=role_color("teacher"),
                markersize=7, label="teacher", clip_on=False)  # fmt: skip
        for member, at in zip(members, x, strict=True):
            ax.annotate(
                member.name, (at, member.student.fidelity.kl), xytext=(0, -15), ha="center",
                textcoords="offset points", fontsize=11, color=MUTED,
            )  # fmt: skip
        low, high = ax.get_ylim()
        ax.set_ylim(min(0.0, low) - 0.12 * high, high)
        ax.set_xlabel(f"parameters ({unit})" if unit else "parameters")
        ax.set_ylabel("KL to the teacher (nats a token)")
        ax.legend(frameon=False, fontsize=11, labelcolor=MUTED)

    alt = "KL to the teacher against parameters. " + " ".join(
        f"{m.name}: {text.count(m.student.parameters)} parameters, "
        f"{text.digits(m.untrained.fidelity.kl)} as pruned, "
        f"{text.digits(m.student.fidelity.kl)} distilled."
        for m in members
    )
    return svg_chart("family-size", "Quality against size", alt, draw)


def speed_charts(report: FamilyReport) -> list[Chart]:
    """KL against decoding speed, where every member's was measured."""
    members = report.members
    x = [member.decoding for member in members if member.decoding is not None]
    if len(x) < len(members):
        return []

    def draw(ax: Axes) -> None:
        y = [member.student.fidelity.kl for member in members]
        ax.plot(x, y, "o-", color=role_color("student"), markersize=7)
        ax.plot(1, 0, "D", color=role_color("teacher"), markersize=7, clip_on=False)
        names = ["teacher", *(member.name for member in members)]
        for label, at in zip(names, zip([1.0, *x], [0.0, *y], strict=True), strict=True):
            ax.annotate(
                label, at, xytext=(0, -15), ha="center", textcoords="offset points",
                fontsize=11, color=MUTED,
            )  # fmt: skip
        low, high = ax.get_ylim()
        ax.set_ylim(min(0.0, low) - 0.12 * high, high)
        ax.set_xlabel("decoding, times the teacher’s tokens/s in the same run")
        ax.set_ylabel("KL to the teacher (nats a token)")

    alt = "KL to the teacher against decoding speed. " + " ".join(
        f"{member.name}: {times:.2f} times the teacher’s, KL "
        f"{text.digits(member.student.fidelity.kl)}."
        for member, times in zip(members, x, strict=True)
    )
    return [svg_chart("family-speed", "Quality against speed", alt, draw)]


def recovery_chart(report: FamilyReport) -> Chart:
    """Top-1 agreement of every member."""
    members = report.members

    def draw(ax: Axes) -> None:
        values = [100 * member.student.fidelity.top1_agreement for member in members]
        bars = ax.barh(range(len(members)), values, color=ACCENT, height=0.55)
        ax.bar_label(bars, labels=[f"{v:.1f} %" for v in values], padding=5, fontsize=11)
        ax.set_yticks(range(len(members)), [member.name for member in members])
        ax.invert_yaxis()
        ax.set_xlim(0, 118)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("top-1 agreement with the teacher (%)")

    alt = "Top-1 agreement with the teacher: " + ", ".join(
        f"{m.name} {text.percent(m.student.fidelity.top1_agreement, 1)}" for m in members
    )
    height = (90 + 44 * len(members)) / 72
    return svg_chart("family-top1", "Agreement", alt + ".", draw, height=height)
