"""The task files of `evaluate.lm_eval`: where they are, and what runs again if they change."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from stillhouse.evaluation.evaluate_config import LmEvalRecipe
from stillhouse.language_model import package_check
from stillhouse.language_model.evaluate_stage import evaluation_arguments, plan_teacher
from stillhouse.language_model.job import Job, find_models
from stillhouse.runfolder import Cost, Stage
from tests import tiny

DATA = Stage("data", Path(), "digest", Cost(), {}, False)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job with two custom tasks and one of lm-eval's, which shares its name with a folder."""
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "mine.yaml").write_text("task: mine")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "other.yaml").write_text("task: other")
    named = {"tasks": ["mine.yaml", "other", "arc_easy"], "include_path": "tasks"}
    raw = tiny.recipe(tmp_path, evaluate={"lm_eval": named})
    return find_models(tiny.parsed(raw), tmp_path)


def test_paths_are_relative_to_the_recipe_in_checks_and_in_the_evaluation(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[LmEvalRecipe] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(package_check, "require_tasks", found.append)
    assert not list(package_check.require_options(job))
    arguments: dict[str, Any] = evaluation_arguments(job, job.recipe.evaluate, [])
    found.append(arguments["section"].lm_eval)
    for section in found:
        assert section.tasks == [str(tmp_path / "mine.yaml"), "other", "arc_easy"]
        assert section.include_path == str(tmp_path / "tasks")


@pytest.mark.parametrize("changed", ["mine.yaml", "tasks/other.yaml", "tasks/score.py"])
def test_the_evaluation_runs_again_if_a_task_file_changes(
    job: Job, tmp_path: Path, changed: str
) -> None:
    before = plan_teacher(job, DATA).inputs
    (tmp_path / "tasks" / "data.jsonl").write_text("{}")
    assert plan_teacher(job, DATA).inputs == before
    (tmp_path / changed).write_text("# changed")
    assert plan_teacher(job, DATA).inputs != before


def test_files_in_the_run_folder_are_not_task_files(job: Job, tmp_path: Path) -> None:
    lm_eval = LmEvalRecipe(tasks=["other"], include_path=".")
    evaluate = job.recipe.evaluate.model_copy(update={"lm_eval": lm_eval})
    job = Job(job.recipe.model_copy(update={"evaluate": evaluate}), tmp_path, job.teacher, None, 1)
    before = plan_teacher(job, DATA).inputs
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: tiny")
    assert plan_teacher(job, DATA).inputs == before
