"""Runs stages in the main process, and provides checks that stage plans share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from stillhouse.hardware import cores_of, free_memory, tune_allocator
from stillhouse.launch import processes_here, world_size
from stillhouse.pipeline.run_progress import recorded_step
from stillhouse.processes import lost_process
from stillhouse.runfolder import RunFolder, Stage, StagePlan
from stillhouse.teachers.load_model import check_loadable
from stillhouse.teachers.model_source import ModelSource
from stillhouse.training.train import MODEL

Do = Callable[[StagePlan], Stage]
"""Runs a stage unless it is finished."""


def doing(folder: RunFolder) -> Do:
    """Return the function with which the main process runs a stage."""

    def do(plan: StagePlan) -> Stage:
        tune_allocator()  # the previous stage may have undone it to save memory
        free_memory()
        if plan.missing is not None:
            found = folder.finished(plan)
            if found is not None and plan.missing(found):
                shutil.rmtree(found.path)
        here, all_ = (processes_here(), world_size()) if plan.together else (1, 1)
        with (
            recorded_step(folder, plan.name, plan.folder) as finished,
            cores_of(here),
            lost_process(all_),
        ):
            stage = folder.stage(plan)
            finished.append(stage)
        return stage

    return do


def unanswered(stage: Stage) -> int:
    """The number of the stage's unanswered requests that may succeed if they are sent again."""
    return int(stage.summary.get("unanswered", 0))


def model_check(start: ModelSource) -> Callable[[Path], None]:
    """Return the check for a stage that writes a causal language model derived from `start`."""
    return lambda out: check_loadable(start.derived(out / MODEL))
