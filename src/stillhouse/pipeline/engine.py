"""Runs the steps of a kind of run, each stage once, on all processes of a torchrun."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.atomic_files import write_atomically
from stillhouse.errors import RecipeError
from stillhouse.evaluation.results import EVALUATION
from stillhouse.finding import Finding
from stillhouse.hardware import cores_of, free_memory, tune_allocator
from stillhouse.launch import (
    end_with_torchrun,
    leads,
    processes_here,
    world_size,
)
from stillhouse.pipeline.kind import ALL, Kind, RunResult, Step
from stillhouse.pipeline.report_stage import REPORT
from stillhouse.pipeline.run_progress import expect_steps, recorded
from stillhouse.pipeline.shared_folder import joining, leading, wait_for_main_process
from stillhouse.pipeline.stage_plan import Do, doing
from stillhouse.pipeline.time_left import TimeLeft
from stillhouse.processes import lost_process
from stillhouse.progress import note
from stillhouse.run_recipe import RunRecipe
from stillhouse.runfolder import Outcome, RunFolder, Stage, StagePlan, run_root
from stillhouse.scratch import scratch_in
from stillhouse.section import recipe_yaml

RECIPE = "recipe.yaml"
RESOLVED = "# The resolved recipe of this run; every start writes it again.\n"
"""The first line of `RECIPE`; it must not change, because it identifies files that runs wrote."""


def run_kind(kind: Kind, recipe: Any, base: Path) -> RunResult | None:
    """Run a recipe of this kind. The main process gets the result; the others get None.

    Raises StillhouseError; finished stages are kept.
    """
    tune_allocator()
    end_with_torchrun()
    with lost_process(world_size()):
        if leads():
            locked = leading(run_root(recipe), locked_folder(recipe))
            with locked as folder, recorded(folder, base):
                return lead(kind, recipe, base, folder)
        with followed_folder(recipe) as folder:
            if kind.follow is not None:
                kind.follow(recipe, base, folder)
            else:
                run_steps(kind, kind.find(recipe, base), following(folder))
    return None


def lead(kind: Kind, recipe: Any, base: Path, folder: RunFolder, job: Any = None) -> RunResult:
    """Run every step in a locked folder. job: the recipe's job, if its steps' requirements have
    been checked already."""
    if kind.lead is not None:
        return kind.lead(recipe, base, folder)
    finished: list[Stage] = []
    if job is None:
        job = kind.find(recipe, base)
        require_all(kind, job)
    do = reporting(folder, finished, kind, job)
    applying = [step.name for step in kind.steps if step.applies(job)]
    expect_steps(folder, applying)
    links = kind.links(job)
    for name, (step, _) in links.items():
        if step in applying:
            folder.require_free(name)
    job, stages = run_steps(kind, job, do)
    for name, (step, path) in links.items():
        if step in stages:
            folder.point(name, stages[step].path / path)
    return RunResult(
        kind=kind.name,
        folder=folder.links,
        model=folder.links / next(iter(links)),
        report=folder.links / REPORT,
        evaluation=kind.load_evaluation(stages["evaluate"].path / EVALUATION),
        stages=finished,
    )


def run_steps(
    kind: Kind, job: Any, do: Do, *, only: Container[str] | None = None
) -> tuple[Any, dict[str, Stage]]:
    """Run the steps in order; return the job after the last step, and the finished stages by step.

    only: the names of the steps to run; None for all.
    """
    stages: dict[str, Stage] = {}
    for step in kind.steps:
        if only is not None and step.name not in only:
            continue
        if not step.applies(job) or (step.main_process and not leads()):
            continue
        stage = do(planned(step, job, stages))
        stages[step.name] = stage
        if step.then is not None:
            job = step.then(job, stages, do)
    return job, stages


def require_all(kind: Kind, job: Any) -> None:
    """Raise StillhouseError if a step cannot succeed; print warnings."""
    for step in kind.steps:
        if step.require is not None and step.applies(job):
            require(step.require(job))


def require(findings: Iterable[Finding]) -> None:
    """Print warnings, and raise the first error."""
    for finding in findings:
        if finding.level == "error":
            raise RecipeError(finding.text, where=finding.topic, fix=finding.fix)
        if finding.level == "warning":
            note(f"warning: {finding.text}" + (f" ({finding.fix})" if finding.fix else ""))


def planned(step: Step, job: Any, stages: dict[str, Stage]) -> StagePlan:
    if step.reads == ALL:
        return step.plan(job, dict(stages))
    return step.plan(job, *(stages.get(name) for name in step.reads))


def run_folder(recipe: RunRecipe) -> RunFolder:
    return RunFolder(run_root(recipe))


def has_finished(recipe: RunRecipe, stage: str) -> bool:
    """Whether the recipe's run folder contains a stage with this name, for any inputs, so that its
    requests need not be sent or paid for again."""
    return any(run_folder(recipe).stages.glob(f"{stage}-*"))


@contextmanager
def locked_folder(recipe: Any) -> Iterator[RunFolder]:
    """Lock the recipe's run folder for this process, and write the resolved recipe to it.

    Raises RunError if another process has locked it.
    """
    folder = run_folder(recipe)
    with folder.locked():
        file = folder.root / RECIPE
        if file.is_file() and file.read_bytes()[: len(RESOLVED)] != RESOLVED.encode():
            folder.require_own(RECIPE)
        write_atomically(file, RESOLVED + recipe_yaml(recipe))
        yield folder


@contextmanager
def followed_folder(recipe: Any) -> Iterator[RunFolder]:
    """Join the main process's run folder, in the other processes of its torchrun.

    Raises RunError if a process does not see the folder or the main process cannot lock it.
    """
    folder = run_folder(recipe)
    with joining(folder.root), scratch_in(folder.root):
        yield folder


@contextmanager
def stages_of(recipe: RunRecipe) -> Iterator[Do]:
    """Yield the function with which this process runs stages in the recipe's folder, which the main
    process locks. Does not write the recipe to the folder.

    Raises RunError like `followed_folder`.
    """
    folder = run_folder(recipe)
    if leads():
        with leading(folder.root, folder.locked()):
            yield doing(folder)
    else:
        with followed_folder(recipe):
            yield following(folder)


def reporting(folder: RunFolder, finished: list[Stage], kind: Kind, job: Any) -> Do:
    """Like `doing`, but also print what each stage does, the time left, and how long the stage
    took, and append the stage to `finished`."""
    run_stage = doing(folder)
    purposes = {step.name: step.purpose for step in kind.steps if step.purpose}
    names = list(dict.fromkeys(step.name for step in kind.steps if step.applies(job)))
    expect = kind.expected_seconds and partial(kind.expected_seconds, job, names)
    left = TimeLeft(expect or (lambda finished: {}), finished)

    def announced(plan: StagePlan) -> StagePlan:
        def work(out: Path) -> Outcome:
            note(f"{plan.name + ':':<10} {purposes.get(plan.name, '')}{left.text(plan.name)}")
            return plan.work(out)

        return replace(plan, work=work)

    def do(plan: StagePlan) -> Stage:
        began = time.monotonic()
        stage = run_stage(announced(plan))
        took = "already done" if stage.reused else f"done in {time.monotonic() - began:,.1f} s"
        note(f"{plan.name + ':':<10} {took}")
        finished.append(stage)
        return stage

    return do


def following(folder: RunFolder) -> Do:
    """Return the function with which a torchrun's other processes run a stage: they take part in
    it or wait for it."""

    def do(plan: StagePlan) -> Stage:
        found = folder.finished(plan)
        if plan.together and (found is None or (plan.missing is not None and plan.missing(found))):
            with cores_of(processes_here()), lost_process(world_size()):
                plan.work(folder.partial(plan))
            free_memory()
        return wait_for_main_process(lambda: folder.finished(plan), f"{plan.name} stage")

    return do
