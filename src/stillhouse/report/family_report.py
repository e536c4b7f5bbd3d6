"""The report on a family: every member's quality against its size, and the family's cost."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse import number_format as text
from stillhouse.evaluation.family_evaluation import (
    CutTeacher,
    FamilyEvaluation,
    Member,
    ScratchTraining,
)
from stillhouse.evaluation.metrics import metrics_of
from stillhouse.report.charts import Bar, BarChart, Chart, Line, LineChart, in_units, role_color
from stillhouse.report.formats import KL_LABEL
from stillhouse.report.page import Report, Section
from stillhouse.report.sections import (
    RunFacts,
    assemble,
    filled,
    generations_section,
)

_LEARNED_FROM = {
    "original": "the original teacher",
    "previous": "the trained member before it (the first from the teacher)",
    "both": "the original teacher and the trained member before it",
}


def family_report(run: RunFacts, family: FamilyEvaluation) -> Report:
    chain = "is pruned from the teacher"
    if family.chained:
        chain = "starts from the trained member before it"
    remarks = [f"Every member learns from {_LEARNED_FROM[family.learned_from]}, and {chain}."]
    if family.cut is not None:
        remarks.append(_cut_sentence(family.cut))
    charts = [_size_chart(family), *_speed_charts(family), _agreement_chart(family)]
    links = [(f"Report of {member.name}", member.report) for member in family.members]
    scratch = _scratch_part(family.members[0], family.scratch)
    return assemble(
        "family",
        run,
        _headline(family),
        Section("Members", "members", table=metrics_of(family), charts=charts, links=links),
        generations_section(family.generations),
        Section("Cost of the family", "cost", facts=_totals(family), parts=filled(scratch)),
        remarks=remarks,
    )


def _headline(family: FamilyEvaluation) -> str:
    last = family.members[-1]
    cut = "" if family.cut is None else "cut "
    original = family.cut.parameters[0] if family.cut else family.teacher.parameters
    share = last.student.parameters / original
    names = f"{len(family.members)} students" if len(family.members) > 1 else "One student"
    return (
        f"{names}, down to {text.percent(share)} of the teacher’s parameters; the smallest agrees "
        f"with the {cut}teacher’s top-1 token at "
        f"{text.percent(last.student.fidelity.top1_agreement, 1)} of positions."
    )


def _cut_sentence(cut: CutTeacher) -> str:
    (tokens, left), (original, parameters) = cut.tokens, cut.parameters
    sentence = (
        f"The teacher was cut to {left:,} of its {tokens:,} tokens, and {text.count(parameters)} "
        f"of its {text.count(original)} parameters; all metrics are relative to the cut teacher."
    )
    if cut.perplexity is not None:
        before, after = map(text.digits, cut.perplexity)
        sentence += (
            f" On training text without the removed tokens, its perplexity is {after}, and the "
            f"original teacher’s is {before}; other text takes more tokens than before."
        )
    return sentence


def _totals(family: FamilyEvaluation) -> list[tuple[str, str]]:
    members = family.members
    seconds = sum(member.seconds for member in members)
    totals = [
        ("Training tokens", text.count(sum(member.tokens for member in members))),
        ("Computation (FLOPs)", text.flops(sum(member.flops for member in members))),
        ("Time", text.seconds(seconds)),
    ]
    if family.watts:
        energy = f"{seconds * family.watts / 3.6e6:.2g} kWh, at an assumed {family.watts:,.0f} W"
        totals.append(("Energy", energy))
    return totals


def _scratch_part(member: Member, scratch: ScratchTraining | None) -> Section:
    """Compare the largest member with the same shape trained from random weights."""
    title = "Training from random weights"
    if scratch is None:
        return Section(title)
    kl, (last, last_kl) = member.student.fidelity.kl, scratch.points[-1]
    same = scratch.kl_at(member.tokens)
    lead = (
        f"A model with the shape of {member.name}, trained from random weights with the same "
        "teacher; its held-out KL was measured along the way. "
    )
    if same is not None:
        lead += (
            f"After {member.tokens:,} tokens it has a KL of {text.digits(same)} nats/token; "
            f"{member.name} has {text.digits(kl)} after the same number."
        )
    else:
        lead += (
            f"At its last measurement, after {last:,} tokens, it has a KL of "
            f"{text.digits(last_kl)} nats/token; {member.name} has {text.digits(kl)} after "
            f"{member.tokens:,}."
        )
    tokens, label = in_units([*(x for x, _ in scratch.points), member.tokens], "training tokens")
    kls = [kl for _, kl in scratch.points]
    lines = [
        Line(tokens[:-1], kls, role_color("untrained"), "random weights", "measured"),
        Line(tokens[-1:], [kl], role_color("student"), member.name, "diamond"),
    ]
    chart = LineChart(
        "KL from random weights", label, KL_LABEL, lines, log=True, x_limits=(0, None)
    )
    facts = [
        ("Training tokens from random weights", text.count(last)),
        ("Computation (FLOPs)", text.flops(scratch.flops)),
        ("Time", text.seconds(scratch.seconds)),
    ]
    return Section(title, lead=lead, charts=[chart], facts=facts)


def _size_chart(family: FamilyEvaluation) -> Chart:
    """Chart KL against parameters, with one line for the pruned and one for the trained members."""
    members = family.members
    sizes = [family.teacher.parameters, *(member.student.parameters for member in members)]
    (teacher_size, *x), label = in_units(sizes, "parameters")
    names = [member.name for member in members]
    pruned = [member.untrained.fidelity.kl for member in members]
    lines = [
        Line(x, pruned, role_color("untrained"), "as pruned", "joined"),
        Line(x, _kls(members), role_color("student"), "distilled", "joined", names),
        Line([teacher_size], [0.0], role_color("teacher"), "teacher", "diamond"),
    ]
    return LineChart("Quality against size", label, KL_LABEL, lines)


def _speed_charts(family: FamilyEvaluation) -> list[Chart]:
    """Chart KL against decoding speed, if it was measured for every member."""
    members = family.members
    x = [member.decoding for member in members if member.decoding is not None]
    if len(x) < len(members):
        return []
    names = [member.name for member in members]
    lines = [
        Line(x, _kls(members), role_color("student"), style="joined", names=names),
        Line([1.0], [0.0], role_color("teacher"), style="diamond", names=["teacher"]),
    ]
    label = "decoding speed (1 = the teacher in the same run)"
    return [LineChart("Quality against speed", label, KL_LABEL, lines)]


def _agreement_chart(family: FamilyEvaluation) -> Chart:
    shares = [(member.name, member.student.fidelity.top1_agreement) for member in family.members]
    bars = [Bar(name, 100 * share, text.percent(share, 1)) for name, share in shares]
    return BarChart("Agreement", "top-1 agreement with the teacher (%)", bars)


def _kls(members: Sequence[Member]) -> list[float]:
    return [member.student.fidelity.kl for member in members]
