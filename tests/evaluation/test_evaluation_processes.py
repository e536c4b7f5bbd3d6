"""The evaluation is the same with any number of processes, and with a teacher measured earlier."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.evaluation.evaluate import evaluate, fitting_together
from stillhouse.evaluation.evaluate_config import EvaluateRecipe
from stillhouse.evaluation.kept_teacher import KeptTeacher
from stillhouse.hardware import Precision
from stillhouse.launch import leads
from stillhouse.teachers.model_source import ModelSource
from tests import forks

from .toys import VOCABULARY, mixed_windows, save_toy, toy_model

pytestmark = pytest.mark.run

MODULE = importlib.import_module("stillhouse.evaluation.evaluate")
SECTION = EvaluateRecipe(prompts=["the cat"], max_new_tokens=4, speed=False)


def options(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "section": SECTION,
        "windows": mixed_windows(),
        "seed": 0,
        "vocabulary": VOCABULARY,
        "precision": Precision(dtype, "for the test"),
    }


def models(folder: Path) -> dict[str, Path]:
    if not (folder / "teacher").exists():
        save_toy(folder / "teacher", toy_model(0))
        save_toy(folder / "student", toy_model(1, layers=1))
    return {role: folder / role for role in ("teacher", "student")}


def measure(folder: Path, out: str, kept: str | None = None) -> None:
    teacher = None if kept is None else KeptTeacher.load(folder / kept)
    found = evaluate(models(folder), kept=teacher, **options())
    if leads():
        found.save(folder / out)


def keep(folder: Path, out: str) -> None:
    (folder / out).mkdir(exist_ok=True)
    evaluate({"teacher": models(folder)["teacher"]}, keep=folder / out, **options())


def in_processes(count: int, work: Any) -> None:
    for rank in forks.ranks(count, work):
        assert rank.wait(timeout=250) == 0, rank.communicate()[1][-3000:]


def test_several_processes_measure_what_one_does(tmp_path: Path) -> None:
    """This includes a teacher that a different number of processes measured earlier."""
    models(tmp_path)
    for count in (1, 2, 4):
        in_processes(count, partial(measure, tmp_path, f"{count}.json"))
    one = (tmp_path / "1.json").read_bytes()
    assert (tmp_path / "2.json").read_bytes() == one
    assert (tmp_path / "4.json").read_bytes() == one
    in_processes(2, partial(keep, tmp_path, "kept"))
    for count in (1, 4):
        in_processes(count, partial(measure, tmp_path, "again.json", "kept"))
        assert (tmp_path / "again.json").read_bytes() == one


def test_a_teacher_that_was_measured_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = models(tmp_path)
    keep(tmp_path, "kept")
    loaded: list[str] = []
    real = MODULE.load_model

    def load(model: ModelSource, **more: Any) -> Any:
        loaded.append(model.path.name)
        return real(model, **more)

    monkeypatch.setattr(MODULE, "load_model", load)
    kept = KeptTeacher.load(tmp_path / "kept")
    found = evaluate(paths, kept=kept, **options())
    assert loaded == ["student"]
    assert found.models == evaluate(paths, **options()).models
    assert found.generations[0].answers.keys() == {"teacher", "student"}
    # In a different dtype, the teacher's answers differ, so it runs again.
    loaded.clear()
    evaluate(paths, kept=kept, **options(torch.bfloat16))
    assert loaded == ["teacher", "student"]


def test_the_speed_of_models_that_do_not_fit_in_memory_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fitting_together({"teacher": 140, "student": 16, "untrained": 16}, 100) == [
        "student",
        "untrained",
    ]
    assert fitting_together({"teacher": 50, "student": 16}, 100) == ["student", "teacher"]
    assert fitting_together({"student": 16}, 10) == ["student"]
    paths = models(tmp_path)
    smaller = toy_model(1, layers=1).num_parameters() * 4
    monkeypatch.setattr(MODULE, "free_memory_bytes", lambda _: 2 * smaller)
    monkeypatch.setattr(MODULE, "measure_peak_memory", lambda *_, **__: 1)
    found = evaluate(paths, **{**options(), "section": EvaluateRecipe(speed=True)})
    teacher, student = found.models
    assert teacher.speed is None
    assert student.speed is not None
    left_out = "Teacher: speed and memory are not measured"
    assert any(note.startswith(left_out) for note in found.notes)
