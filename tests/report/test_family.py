"""The family's page: what it shows of every member, and what it leaves out when nobody measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillhouse.evaluate.results import Fidelity
from stillhouse.report import report_text as text
from stillhouse.report.family_page import (
    CutTeacher,
    FamilyReport,
    FromScratch,
    Member,
    ScratchMember,
    render_family_report,
)
from tests.report.conftest import model


def member(name: str, parameters: int, kl: float, decoding: float | None) -> Member:
    return Member(
        name=name,
        untrained=model("untrained", parameters, Fidelity(50.0, 2 * kl, 0.5, 0.02, 8123), 0.0),
        student=model("student", parameters, Fidelity(25.0, kl, 0.7, 0.02, 8123), 22.0),
        shape={"ffn_size": (1536, 1024)},
        report=f"{name}/report.html",
        tokens=60_000,
        flops=10**13,
        seconds=300.0,
        decoding=decoding,
    )


@pytest.fixture
def report() -> FamilyReport:
    return FamilyReport(
        title="family",
        teacher=model("teacher", 134_515_008, Fidelity(18.7, 0.0, 1.0, 0.02, 8123), 20.0),
        members=[
            member("108m", 107_961_408, 0.3512, 1.25),
            member("70m", 70_000_000, 0.6123, 1.75),
        ],
        chained=True,
    )


def test_a_teacher_that_lost_tokens_is_told_apart_from_the_whole_one(
    report: FamilyReport,
) -> None:
    cut = CutTeacher((49152, 24576), (148_670_784, 134_515_008), (18.5, 18.1))
    page = render_family_report(replace(report, cut=cut))
    assert f"down to {text.percent(70_000_000 / 148_670_784)} of the teacher’s parameters" in page
    assert "the cut teacher’s likeliest next token" in page
    assert "24,576 of its 49,152 tokens" in page
    assert "its perplexity is 18.1, where the whole teacher’s is 18.5" in page
    assert "perplexity is" not in render_family_report(
        replace(report, cut=replace(cut, perplexity=None))
    )
    assert "cut teacher" not in render_family_report(report)


def test_every_member_has_its_size_quality_speed_and_memory(report: FamilyReport) -> None:
    page = render_family_report(report)
    for shown in ("0.351", "1.25 ×", "0.612", "1.75 ×", text.size(1_200_000_000)):
        assert shown in page
    for parameters in (134_515_008, 107_961_408, 70_000_000):
        assert text.count(parameters) in page
    assert "Quality against speed" in page
    assert "70m: 1.75 times the teacher’s, KL 0.612" in page


def test_what_random_weights_would_take_has_time_and_energy(report: FamilyReport) -> None:
    members = [
        ScratchMember(name, tokens, tokens / 2, 2 * tokens, 5.0, 10**9)
        for name, tokens in (("108m", 3.6e6), ("70m", 3.6e12))
    ]
    scratch = FromScratch(members, 10**5, [(10**4, 4.0), (10**5, 3.0)], 0.1, 10.0, rate=1e12)
    page = render_family_report(replace(report, scratch=scratch, watts=20.0))
    # 3.6 million tokens of 10⁹ FLOPs at 10¹² a second: an hour at 20 W.
    assert "1 h 00 min" in text_of(page)
    assert "0.02 kWh" in page
    assert f"{text.ratio(3.6e9 / 31_557_600)} years" in text_of(page)
    assert "1,000 GFLOP/s" in text_of(page)
    assert "Time and energy are extrapolated" in page
    assert "kWh" not in render_family_report(replace(report, scratch=scratch))


def text_of(page: str) -> str:
    return page.replace(text.NBSP, " ")


def test_what_was_not_measured_for_every_member_is_not_drawn(report: FamilyReport) -> None:
    members = [report.members[0], replace(report.members[1], decoding=None)]
    page = render_family_report(replace(report, members=members))
    assert "1.25 ×" in page
    assert "Quality against speed" not in page
