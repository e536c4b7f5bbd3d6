"""What a stage depends on, the work that fills its folder, and how that is done and told."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.data import Windows, open_windows
from stillhouse.hardware import tune_allocator
from stillhouse.progress import note
from stillhouse.runfolder import Outcome, RunFolder, Stage
from stillhouse.teachers.local import check_loadable
from stillhouse.training import MODEL


@dataclass(frozen=True)
class StagePlan:
    """inputs: all that the result depends on. together: every process of a torchrun takes part.

    version: raised when the stage's code changes what it writes, so that it is done again.
    check: raises StillhouseError where the filled folder lacks its product (`RunFolder.stage`).
    """

    name: str
    inputs: dict[str, Any]
    work: Callable[[Path], Outcome]
    version: int = 1
    resumable: bool = False
    together: bool = False
    scratch: tuple[str, ...] = field(default=())
    check: Callable[[Path], None] | None = None

    @property
    def depends_on(self) -> dict[str, Any]:
        return {**self.inputs, "version": self.version}


Do = Callable[[StagePlan], Stage]
"""Does a stage, or finds it done."""


def doing(folder: RunFolder) -> Do:
    """How the leading process does a stage."""

    def do(plan: StagePlan) -> Stage:
        tune_allocator()  # the stage before may have been short of memory
        return folder.stage(
            plan.name,
            plan.depends_on,
            plan.work,
            resumable=plan.resumable,
            scratch=plan.scratch,
            check=plan.check,
        )

    return do


def telling(folder: RunFolder, finished: list[Stage]) -> Do:
    """As `doing`; says how long each took, and adds it to `finished`."""
    quietly = doing(folder)

    def do(plan: StagePlan) -> Stage:
        began = time.monotonic()
        stage = quietly(plan)
        took = "already done" if stage.reused else f"{time.monotonic() - began:,.1f} s"
        note(f"{plan.name + ':':<10} {took}")
        finished.append(stage)
        return stage

    return do


def model_check(trust_remote_code: bool) -> Callable[[Path], None]:
    """The check of a stage that writes a causal language model."""
    return lambda out: check_loadable(out / MODEL, trust_remote_code=trust_remote_code)


def redone(folder: RunFolder, plan: StagePlan, lacks: Callable[[Stage], int]) -> StagePlan:
    """The plan; what is finished of it and lacks something is removed, so that it is done anew."""
    found = folder.finished(plan.name, plan.depends_on)
    if found is not None and lacks(found):
        shutil.rmtree(found.path)
    return plan


def unanswered(stage: Stage) -> int:
    """Requests of the stage that had no answer, and may have one when they are asked again."""
    return int(stage.summary.get("unanswered", 0))


def open_data(data: Stage) -> tuple[Windows, Windows]:
    return open_windows(data.path / "train"), open_windows(data.path / "heldout")
