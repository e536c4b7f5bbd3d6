"""The family's page: what it shows for each member, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillhouse import number_format as text
from stillhouse.evaluation.family_evaluation import (
    CutTeacher,
    FamilyEvaluation,
    Member,
    ScratchTraining,
)
from stillhouse.evaluation.results import Fidelity
from stillhouse.report.family_report import family_report
from stillhouse.report.page import render
from stillhouse.report.sections import RunFacts
from tests.report.conftest import model


def page_of(family: FamilyEvaluation) -> str:
    return render(family_report(RunFacts("family", "2026-11-24 04:12", {}, "", [], {}, {}), family))


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
def family() -> FamilyEvaluation:
    return FamilyEvaluation(
        teacher=model("teacher", 134_515_008, Fidelity(18.7, 0.0, 1.0, 0.02, 8123), 20.0),
        members=[
            member("108m", 107_961_408, 0.3512, 1.25),
            member("70m", 70_000_000, 0.6123, 1.75),
        ],
        chained=True,
        watts=20.0,
    )


def test_a_teacher_with_a_cut_vocabulary_is_distinguished_from_the_original(
    family: FamilyEvaluation,
) -> None:
    cut = CutTeacher((49152, 24576), (148_670_784, 134_515_008), (18.5, 18.1))
    page = page_of(replace(family, cut=cut))
    assert f"down to {text.percent(70_000_000 / 148_670_784)} of the teacher’s parameters" in page
    assert "the cut teacher’s top-1 token" in page
    assert "24,576 of its 49,152 tokens" in page
    assert "its perplexity is 18.1, and the original teacher’s is 18.5" in page
    assert "perplexity is" not in page_of(replace(family, cut=replace(cut, perplexity=None)))
    assert "cut teacher" not in page_of(family)


def test_the_page_shows_every_members_size_quality_speed_and_memory(
    family: FamilyEvaluation,
) -> None:
    page = page_of(family)
    for shown in ("0.351", "1.25\u00a0×", "0.612", "1.75\u00a0×", text.size(1_200_000_000)):
        assert shown in page
    for parameters in (134_515_008, 107_961_408, 70_000_000):
        assert text.count(parameters) in page
    assert "Quality against speed" in page
    assert "108m: 1.25, 0.351; 70m: 1.75, 0.612" in page
    assert "FFN size 1,536 → 1,024" in page
    assert "0.0033 kWh, at an assumed 20 W" in page  # 600 s


@pytest.mark.run
def test_training_from_random_weights_is_compared_with_the_member_at_equal_tokens(
    family: FamilyEvaluation,
) -> None:
    """Its KL is interpolated linearly between two measurements, and never extrapolated."""
    scratch = ScratchTraining([(40_000, 4.0), (80_000, 3.0)], flops=10**13, seconds=3600.0)
    assert scratch.kl_at(40_000) == 4.0
    assert scratch.kl_at(60_000) == 3.5
    assert scratch.kl_at(80_001) is None
    page = page_of(replace(family, scratch=scratch))
    assert (
        "After 60,000 tokens it has a KL of 3.50 nats/token; 108m has 0.351 after the same number"
        in page
    )
    assert "1 h 00 min" in page.replace(text.NBSP, " ")
    short = ScratchTraining([(10_000, 6.0), (20_000, 5.0)], flops=10**12, seconds=60.0)
    page = page_of(replace(family, scratch=short))
    assert "At its last measurement, after 20,000 tokens, it has a KL of 5.00 nats/token" in page
    assert "108m has 0.351 after 60,000" in page
    assert "random weights" not in page_of(family)


def test_speeds_that_were_not_measured_for_every_member_are_not_drawn(
    family: FamilyEvaluation,
) -> None:
    members = [family.members[0], replace(family.members[1], decoding=None)]
    page = page_of(replace(family, members=members))
    assert "1.25\u00a0×" in page
    assert "Quality against speed" not in page
