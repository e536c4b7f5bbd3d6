"""A sample of `make bench NAME=knocks`: no silent fault, traceback, or hang."""

from __future__ import annotations

import random

import pytest
from bench.input_trials.trial import BARS
from bench.input_trials.workers import run_one
from bench.knock_trials import disk_trials
from bench.knock_trials.core_waits import CoreWaits
from bench.knock_trials.damage import damaged
from bench.knocks import FAMILIES
from bench.trial_command import TrialBench, time_bar

SAMPLE = {"damage": 6, "server": 10}
SLOW = {"damage": 14, "stop": 2, "kill": 2, "pair": 2}
SEED = 3


@pytest.mark.run
@pytest.mark.parametrize(
    ("family", "end"),
    [*SAMPLE.items(), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW.items())],
)
def test_a_sample_of_every_family_has_no_failures(family: str, end: int) -> None:
    results = [run_one(FAMILIES[family], SEED, number) for number in range(1, end)]
    failures = [f"{each.number} {each.name}: {each.outcome}\n{each.detail}" for each in results
                if each.outcome in BARS]  # fmt: skip
    assert not failures, "\n".join(failures)
    assert "right" in {each.outcome for each in results}


def test_waiting_for_a_core_counts_from_the_signal() -> None:
    """The longest wait since the signal counts. That of a process started later counts in full."""
    waits = CoreWaits(0)
    waits._readings = [(1.0, {7: 0.5}), (2.0, {7: 0.75}), (3.0, {7: 1.0, 8: 0.1}), (4.0, {8: 0.2})]
    assert waits.since(2.0) == 0.25
    assert waits.since(4.0) == 0.0


def test_the_bar_for_the_time_needs_all_families_of_one_seed() -> None:
    bench = TrialBench("knocks", dict.fromkeys(FAMILIES, FAMILIES["kill"]), {}, {}, minutes=40.0)
    part = {"commit": "a", "processes": 2, "seconds": {"1": 60.0, "2": 120.0}}
    parts = dict.fromkeys(FAMILIES, part)
    (bar,) = time_bar(bench, parts)
    assert bar.value == 2.0 * len(FAMILIES)
    assert not time_bar(bench, {**parts, "disk": {**part, "seconds": {"3": 60.0}}})
    assert not time_bar(bench, {"kill": part})
    assert not time_bar(bench, {**parts, "disk": {"commit": "a"}})


def test_damage_always_changes_something() -> None:
    for seed in range(200):
        data = random.Random(seed).randbytes(seed)
        assert damaged(random.Random(seed), data)[1] != data


@pytest.mark.run
@pytest.mark.parametrize("number", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_sample_of_full_disks_and_moved_folders_has_no_failures(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Simulated without permission to mount anything."""
    parts = [("classify", part) for part in ("train", "export", "report")]
    monkeypatch.setattr(disk_trials, "in_turn", lambda only: parts)
    monkeypatch.setattr(disk_trials, "can_mount", lambda: False)
    result = run_one(FAMILIES["disk"], SEED, number)
    assert result.outcome == "right", result.detail
