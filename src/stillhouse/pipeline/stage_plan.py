"""The dependencies of a stage, and the work that fills its folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.hardware import cores_of, free_memory, tune_allocator
from stillhouse.launch import processes_here, world_size
from stillhouse.pipeline.run_progress import recorded_step
from stillhouse.processes import lost_process
from stillhouse.runfolder import Outcome, RunFolder, Stage
from stillhouse.teachers.load_model import check_loadable
from stillhouse.teachers.model_source import ModelSource
from stillhouse.training.train import MODEL


@dataclass(frozen=True)
class StagePlan:
    """A stage that is ready to run.

    inputs: everything that the result depends on; `version` is increased when the code changes what
    it writes. together: all processes of torchrun take part. resumable: a partly written folder is
    continued. scratch: names inside the folder that are deleted before it is finished.
    missing: how many results a finished stage still lacks; it runs again while there are any.
    check: raises StillhouseError if the filled folder lacks its product. compared_when_read:
    patterns of large files whose readers compare their hashes.
    """

    name: str
    inputs: dict[str, Any]
    work: Callable[[Path], Outcome]
    version: int = 1
    resumable: bool = False
    together: bool = False
    scratch: tuple[str, ...] = ()
    missing: Callable[[Stage], int] | None = None
    check: Callable[[Path], None] | None = None
    compared_when_read: tuple[str, ...] = ()

    @property
    def depends_on(self) -> dict[str, Any]:
        return {**self.inputs, "version": self.version}


Do = Callable[[StagePlan], Stage]
"""Runs a stage unless it is finished."""


def doing(folder: RunFolder) -> Do:
    """How the main process runs a stage."""

    def do(plan: StagePlan) -> Stage:
        tune_allocator()  # the previous stage may have needed all memory
        free_memory()
        if plan.missing is not None:
            found = folder.finished(plan.name, plan.depends_on)
            if found is not None and plan.missing(found):
                shutil.rmtree(found.path)
        here, all_ = (processes_here(), world_size()) if plan.together else (1, 1)
        key = folder.key(plan.name, plan.depends_on)
        with (
            recorded_step(folder, plan.name, f"{plan.name}-{key}") as finished,
            cores_of(here),
            lost_process(all_),
        ):
            stage = folder.stage(
                plan.name,
                plan.depends_on,
                plan.work,
                resumable=plan.resumable,
                scratch=plan.scratch,
                check=plan.check,
                compared_when_read=plan.compared_when_read,
            )
            finished.append(stage)
        return stage

    return do


def unanswered(stage: Stage) -> int:
    """Requests of the stage without an answer that may succeed when they are sent again."""
    return int(stage.summary.get("unanswered", 0))


def model_check(start: ModelSource) -> Callable[[Path], None]:
    """The check of a stage that writes a causal language model, made from `start`."""
    return lambda out: check_loadable(start.derived(out / MODEL))
