"""The time left is what stages are expected to take, at the pace of those that are finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from stillhouse.pipeline.time_left import TimeLeft
from stillhouse.runfolder import Cost, Stage

EXPECTED = {"data": 30.0, "student": 30.0, "train": 240.0}


def stage(name: str, seconds: float, *, reused: bool = False) -> Stage:
    return Stage(name, Path(), "", Cost(seconds), {}, reused)


def left(*finished: Stage) -> TimeLeft:
    return TimeLeft(lambda stages: EXPECTED, finished)


def test_all_stages_from_this_one_on_are_counted() -> None:
    assert left().seconds("data") == 300
    assert left().seconds("train") == 240
    assert left().text("data") == " (about 5 min left)"


def test_finished_stages_set_the_pace() -> None:
    assert left(stage("data", 60.0)).seconds("train") == 480
    assert left(stage("data", 20.0), stage("student", 10.0)).seconds("train") == 120


def test_a_stage_that_takes_seconds_does_not_set_the_pace() -> None:
    expected = {"data": 5.0, "train": 240.0}
    quick = TimeLeft(lambda stages: expected, [stage("data", 0.5)])
    assert quick.seconds("train") == 240


def test_a_reused_stage_does_not_set_the_pace() -> None:
    assert left(stage("data", 0.1, reused=True)).seconds("train") == 240


@pytest.mark.parametrize(("seconds", "expected"), [(1e6, 2400), (1e-6, 24)])
def test_the_pace_is_limited(seconds: float, expected: float) -> None:
    assert left(stage("data", seconds)).seconds("train") == pytest.approx(expected)


def test_less_than_a_minute_is_not_given_in_minutes() -> None:
    quick = TimeLeft(lambda stages: {"report": 5.0}, [])
    assert quick.text("report") == " (less than a minute left)"


def test_without_an_expected_time_there_is_no_text() -> None:
    def none_yet(stages: Sequence[Stage]) -> dict[str, float]:
        return EXPECTED if stages else {}

    assert TimeLeft(none_yet, []).text("data") == ""
    assert TimeLeft(none_yet, [stage("data", 10.0)]).text("push") == ""
