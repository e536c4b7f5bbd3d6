"""A sample of `make bench NAME=knocks`: no silent fault, traceback or hang."""

from __future__ import annotations

import random

import pytest
from bench.input_trials.trial import BARS
from bench.input_trials.workers import run_one
from bench.knock_trials import disk_trials
from bench.knock_trials.damage import damaged
from bench.knocks import FAMILIES

SAMPLE = {"damage": 20, "server": 16, "kill": 2, "stop": 2, "pair": 2}
SEED = 3


@pytest.mark.run
@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_of_every_family(family: str) -> None:
    results = [run_one(FAMILIES[family], SEED, number) for number in range(1, SAMPLE[family])]
    failures = [f"{each.number} {each.name}: {each.outcome}\n{each.detail}" for each in results
                if each.outcome in BARS]  # fmt: skip
    assert not failures, "\n".join(failures)
    assert "right" in {each.outcome for each in results}


def test_damage_always_changes_something() -> None:
    for seed in range(200):
        data = random.Random(seed).randbytes(seed)
        assert damaged(random.Random(seed), data)[1] != data


@pytest.mark.run
@pytest.mark.parametrize("number", [0, 4])
def test_a_sample_of_full_disks_and_moved_folders(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Without the right to mount anything."""
    parts = [("classify", part) for part in ("train", "export", "report")]
    monkeypatch.setattr(disk_trials, "in_turn", lambda only: parts)
    monkeypatch.setattr(disk_trials, "can_mount", lambda: False)
    result = run_one(FAMILIES["disk"], SEED, number)
    assert result.outcome == "right", result.detail
