"""The expected time of every stage, from FLOPs, bytes, and processes at this machine's rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.config.load_recipe import parse_recipe
from stillhouse.language_model import expected_time
from stillhouse.language_model.expected_time import LIBRARIES_SECONDS, expected_seconds
from stillhouse.language_model.job import Job
from stillhouse.language_model.language_model import LANGUAGE_MODEL
from stillhouse.language_model.run_models import run_models
from stillhouse.planning.machine import Machine
from stillhouse.planning.model_size import config_size
from stillhouse.runfolder import Cost, Stage
from tests import tiny

RATE = 1e6
NAMES = ["data", "student", "cut", "train", "quantize", "qat", "evaluate", "export", "report"]

pytestmark = pytest.mark.run


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a machine on which even a tiny model takes a while."""

    def machine(precision: str, *, timed: bool) -> Machine:
        return Machine("cpu", 1e6, rate=RATE if timed else None)

    monkeypatch.setattr(expected_time, "this_machine", machine)
    expected_time._timed.cache_clear()
    monkeypatch.setattr(Machine, "compute", lambda *_: torch.float32)


def job(folder: Path, **changes: Any) -> Job:
    raw = tiny.recipe(folder, **changes)
    found = LANGUAGE_MODEL.find(parse_recipe(raw), folder)
    assert isinstance(found, Job)
    return found


def read(tokens: int) -> Stage:
    """A data stage. Tokens that the loss mask leaves out take as long as the others."""
    return Stage(
        "data", Path(), "", Cost(1.0), {"train": {"tokens": tokens, "supervised_tokens": 1}}, False
    )


def test_the_time_of_training_is_its_flops_divided_by_the_rate(
    tmp_path: Path, slow_machine: None
) -> None:
    one = job(tmp_path, train={"batch_size": 2, "epochs": 3})
    found = expected_seconds(one, NAMES, [read(64 * 100)])
    assert list(found) == NAMES
    windows = -(-6400 // one.recipe.data.context)
    steps = 3 * -(-windows // 2)
    models = run_models(one)
    student, teacher = (config_size(each).active for each in (models.student, models.teacher))
    flops = (6 * student + 2 * teacher) * steps * 2 * one.recipe.data.context
    assert found["train"] == pytest.approx(flops / RATE)


def test_more_text_and_more_models_take_longer(tmp_path: Path, slow_machine: None) -> None:
    plain, more = (
        expected_seconds(job(tmp_path, evaluate=section), NAMES, [read(6400)])
        for section in ({"speed": False}, {"speed": True, "cut_baseline": True})
    )
    assert more["evaluate"] > plain["evaluate"] + 4 * LIBRARIES_SECONDS
    longer = expected_seconds(job(tmp_path), NAMES, [read(12800)])
    assert longer["train"] == pytest.approx(2 * plain["train"])


def test_no_time_is_expected_before_the_text_is_known(tmp_path: Path, slow_machine: None) -> None:
    later = {"sources": [{"kind": "text", "path": "later.txt"}], "train_tokens": None}
    one = job(tmp_path, data={**tiny.recipe(tmp_path)["data"], **later})
    assert expected_seconds(one, NAMES, []) == {}
    assert expected_seconds(one, NAMES, [read(6400)])
    assert expected_seconds(one, ["search", *NAMES], [read(6400)]) == {}


def test_text_that_is_not_read_yet_is_estimated_by_its_size(
    tmp_path: Path, slow_machine: None
) -> None:
    (tmp_path / "mine.txt").write_text("four " * 9000)  # 45,000 characters; 512 tokens held out
    data = {**tiny.recipe(tmp_path)["data"], "sources": [{"kind": "text", "path": "mine.txt"}]}
    estimates = {
        most: expected_seconds(job(tmp_path, data={**data, "train_tokens": most}), NAMES, [])
        for most in (None, 1_000_000, 5000)
    }
    one = job(tmp_path)
    for most, tokens in ((None, 9488), (1_000_000, 9488), (5000, 5000)):
        assert estimates[most]["train"] == expected_seconds(one, NAMES, [read(tokens)])["train"]


def test_text_that_the_teacher_has_yet_to_generate_takes_time(
    tmp_path: Path, slow_machine: None
) -> None:
    """Every token costs FLOPs, and the weights are read once for each token of a batch."""
    out = {"kind": "jsonl", "path": "out.jsonl"}
    section: dict[str, Any] = {
        "teacher": {"local": {"batch": 2}},
        "prompts": {"combine": {"templates": ["{n}"], "values": {"n": ["1", "2", "3"]}}},
        "sampling": {"max_tokens": 10},
        "out": "out.jsonl",
    }
    data = {**tiny.recipe(tmp_path)["data"], "sources": [out], "train_tokens": 500}
    one = job(tmp_path, data=data, synthesize=section)
    found = expected_seconds(one, ["synthesis", *NAMES], [])
    teacher = config_size(run_models(one).teacher)
    computed = 2 * teacher.active * 3 * 10 / RATE
    weights = 2 * 10 * 4 * teacher.active / expected_time.BYTES_PER_SECOND
    assert found["synthesis"] == pytest.approx(computed + weights, rel=0.01)
    judge = {"kind": "judge", "teacher": {"local": {}}}
    judged = {
        **section,
        "filters": {"best_of": judge},
        "prompts": {**section["prompts"], "samples": 2},
    }
    other = job(tmp_path, data=data, synthesize=judged)
    assert expected_seconds(other, ["synthesis", *NAMES], []) == {}


def test_no_time_is_expected_for_a_tiny_model(tmp_path: Path) -> None:
    assert expected_seconds(job(tmp_path), NAMES, [read(6400)]) == {}
