"""A sample of `make bench NAME=inputs`: no silent fault, traceback, or hang."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.input_trials.trial import BARS, Trial, judge
from bench.input_trials.workers import run_one
from bench.inputs import FAMILIES
from transformers.utils import logging

from stillhouse.errors import DataError
from stillhouse.progress import note

SAMPLE = {"data": 40, "tables": 20, "models": 20, "gguf": 8, "recipes": 15}
SEED = 2


@pytest.mark.run
@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_of_every_family_has_no_failures(family: str) -> None:
    """Only the benchmark limits the time; machines that run tests are busy."""
    logging.disable_progress_bar()
    untimed = replace(FAMILIES[family], cpu_seconds=600.0)
    results = [run_one(untimed, SEED, number) for number in range(SAMPLE[family])]
    failures = [f"{each.number} {each.name}: {each.outcome}\n{each.detail}" for each in results
                if each.outcome in BARS]  # fmt: skip
    assert not failures, "\n".join(failures)
    assert {each.outcome for each in results} >= {"right", "refused"}


def raises(error: Exception) -> object:
    def read() -> None:
        raise error

    return read


CLEAR = DataError("what", where="where", fix="fix")


@pytest.mark.parametrize(
    ("read", "wrong", "options", "outcome"),
    [
        (lambda: 1, None, {}, "right"),
        (lambda: 1, "another", {}, "silent"),
        (lambda: 1, None, {"refusal": "must"}, "silent"),
        (lambda: note("the tools are left out"), None, {"lost": ("tools",)}, "noted"),
        (lambda: note("hello"), None, {"lost": ("tools",)}, "silent"),
        (lambda: note("bare numbers"), "other", {"excused": ("number",)}, "noted"),
        (raises(CLEAR), None, {"refusal": "may"}, "refused"),
        (raises(CLEAR), None, {}, "wrongly refused"),
        (raises(DataError("what", where="where")), None, {"refusal": "must"}, "unclear"),
        (raises(DataError("what", fix="fix")), None, {"refusal": "must"}, "unclear"),
        (raises(KeyError("x")), None, {"refusal": "must"}, "traceback"),
    ],
)
def test_the_outcome_of_a_trial(
    read: object, wrong: str | None, options: dict[str, object], outcome: str
) -> None:
    trial = Trial("name", read, lambda _: wrong, **options)  # type: ignore[arg-type]
    assert judge(trial)[0] == outcome


def test_trials_with_equal_numbers_are_equal() -> None:
    one, other = (run_one(FAMILIES["tables"], 5, 4) for _ in range(2))
    assert one == other
