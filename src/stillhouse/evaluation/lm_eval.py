"""Benchmark tasks from EleutherAI's lm-eval, which `pip install stillhouse[eval]` installs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from stillhouse.disk_errors import full_disk
from stillhouse.errors import RecipeError, StillhouseError
from stillhouse.evaluation.evaluate_config import LmEvalRecipe
from stillhouse.teachers.model_source import AnyModel, source_of

SEEDED = ("random", "numpy_random", "torch_random", "fewshot_random")


def run_tasks(
    model: AnyModel,
    section: LmEvalRecipe,
    *,
    tokenizer: AnyModel,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """Run tasks, and return scores by `task/metric`, or `task/metric/filter` if a task filters the
    answers.

    Tasks are names of lm-eval's tasks, names from `section.include_path`, or paths of task files.
    Prompts are plain text, without a chat template. Standard errors are left out.

    Raises:
        StillhouseError: lm-eval is not installed.
        RecipeError: a task is unknown or fails, its data cannot be read, or include_path is not a
            folder.
    """
    manager = require_tasks(section)
    from lm_eval import simple_evaluate

    source = source_of(model)
    options: dict[str, Any] = {
        "pretrained": str(source.path),
        "tokenizer": str(source_of(tokenizer).path),
        "dtype": str(dtype).removeprefix("torch."),
        "trust_remote_code": source.trusted,
    }
    with _task_errors("run these tasks", ", ".join(section.tasks)):
        report = simple_evaluate(
            model="hf",
            model_args=options,
            tasks=list(section.tasks),
            num_fewshot=section.num_fewshot,
            limit=section.limit,
            device=str(device),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
            **{f"{name}_seed": seed for name in SEEDED},
        )
    return _scores(report["results"])


@contextmanager
def _task_errors(what: str, where: str) -> Iterator[None]:
    """Raise RecipeError if a task's files, packages, data, or code fail within the context."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tasks contain templates and code, which can fail in any way
        if full_disk(error):
            raise
        fix = "check the tasks' data files and the connection to the Hugging Face Hub"
        if isinstance(error, ImportError):
            fix = "install the package that the task needs, or remove the task"
        elif isinstance(error, yaml.YAMLError):
            fix = "correct the task's file"
        raise RecipeError(
            f"lm-eval could not {what}: {type(error).__name__}: {error}", where=where, fix=fix
        ) from error


def require_tasks(section: LmEvalRecipe) -> Any:
    """Return lm-eval's task manager. Raises the errors of `run_tasks` for unknown tasks and a
    missing installation."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise StillhouseError(
            f"evaluate.lm_eval needs lm-eval, which cannot be imported: {error}",
            fix="run pip install stillhouse[eval], or remove evaluate.lm_eval from the recipe",
        ) from error
    if section.include_path is not None and not Path(section.include_path).is_dir():
        raise RecipeError(
            "evaluate.lm_eval.include_path is not a folder",
            where=section.include_path,
            fix="set it to the folder with your task files (.yaml)",
        )
    with _task_errors("read its tasks", section.include_path or "evaluate.lm_eval"):
        manager = TaskManager(include_path=section.include_path)
    unknown = [
        task for task in section.tasks if task not in manager.all_tasks and not Path(task).is_file()
    ]
    if unknown:
        raise RecipeError(
            f"lm-eval has no task {', '.join(unknown)}",
            where="evaluate.lm_eval.tasks",
            fix="list available tasks with `lm-eval ls tasks`; for your own tasks, set "
            "include_path, or use the path of a task file",
        )
    return manager


def _scores(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Rename lm-eval's `acc,none` to `TASK/acc`, and `acc,FILTER` to `TASK/acc/FILTER`."""
    scores = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}/{metric}" if filtered == "none" else f"{task}/{metric}/{filtered}"
            scores[name] = float(value)
    return scores
