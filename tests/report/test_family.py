"""The family's page: what it shows of every member, and what it leaves out when nobody measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillhouse.evaluate.results import Fidelity
from stillhouse.report import text
from stillhouse.report.family import FamilyReport, Member, render_family_report
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


def test_every_member_has_its_size_quality_speed_and_memory(report: FamilyReport) -> None:
    page = render_family_report(report)
    for shown in ("0.351", "1.25 ×", "0.612", "1.75 ×", text.size(1_200_000_000)):
        assert shown in page
    for parameters in (134_515_008, 107_961_408, 70_000_000):
        assert text.count(parameters) in page
    assert "Quality against speed" in page
    assert "70m: 1.75 times the teacher’s, KL 0.612" in page


def test_what_was_not_measured_for_every_member_is_not_drawn(report: FamilyReport) -> None:
    members = [report.members[0], replace(report.members[1], decoding=None)]
    page = render_family_report(replace(report, members=members))
    assert "1.25 ×" in page
    assert "Quality against speed" not in page
