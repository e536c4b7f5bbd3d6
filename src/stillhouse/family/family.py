"""The kind of run that builds a family: prunes and distills in turn, each student from the last.

Every member is a language-model run. All members share one folder of stages, so the data is built
once, the teacher's signals are recorded once, and finished hops do not rerun when a hop is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.evaluation.family_evaluation import (
    FAMILY_FILE,
    CutTeacher,
    FamilyEvaluation,
    Member,
)
from stillhouse.evaluation.results import Evaluation, Generation, ModelResult
from stillhouse.export.licenses import Origin
from stillhouse.family.from_scratch import train_from_scratch
from stillhouse.family.members import first_member, member_recipe, planned_members, planned_models
from stillhouse.finding import Finding
from stillhouse.hardware import assumed_watts
from stillhouse.language_model.export_check import export_findings
from stillhouse.language_model.job import Job, configs, find_models
from stillhouse.language_model.language_model import DATA_STEPS, LANGUAGE_MODEL
from stillhouse.language_model.model_origins import origins_of
from stillhouse.language_model.recipe import Recipe
from stillhouse.language_model.run_check import check_resources, require_resources
from stillhouse.language_model.run_models import RunModels
from stillhouse.language_model.vocabulary_stage import find_job
from stillhouse.pipeline.engine import following, lead, require_all, run_steps
from stillhouse.pipeline.kind import Kind, RunResult
from stillhouse.pipeline.stage_plan import doing
from stillhouse.planning.model_size import config_size
from stillhouse.progress import note
from stillhouse.report.family_report import family_report
from stillhouse.report.page import FAMILY_REPORT, REPORT_DATA, write_report
from stillhouse.report.sections import RunFacts
from stillhouse.runfolder import RunFolder
from stillhouse.training.train import MODEL

PRODUCING = (
    "synthesis",
    "data",
    "vocabulary",
    "roots",
    "signals",
    "search",
    "student",
    "train",
    "quantize",
    "qat",
)
"""The stages that build a member; the others evaluate and export it."""


def _find(recipe: Recipe, base: Path) -> Job:
    """Return the first member's job. Raises RecipeError if a later member cannot be cut as
    requested."""
    first = find_models(first_member(recipe), base)
    planned_members(recipe, first)
    return find_job(first_member(recipe), base)


def _lead(recipe: Recipe, base: Path, folder: RunFolder) -> RunResult:
    assert recipe.cascade is not None
    for name in (FAMILY_FILE, FAMILY_REPORT, REPORT_DATA):
        folder.require_own(name)
    # Reject an impossible later hop before computing the first.
    first = _find(recipe, base)
    require_all(FAMILY, replace(first, family=recipe))
    members = _members(recipe, base, folder, tuple(origins_of(first)))
    found = _evaluation(recipe, members)
    if recipe.cascade.from_scratch is not None:
        do, results = doing(folder), list(members.values())
        job, _ = run_steps(LANGUAGE_MODEL, first, do, only=DATA_STEPS)
        largest = results[0].stage("train").path / MODEL
        found = replace(found, scratch=train_from_scratch(recipe, job, do, largest))
    found.save(folder.root / FAMILY_FILE)
    page = folder.root / FAMILY_REPORT
    write_report(family_report(RunFacts.gather(recipe, first.teacher.described, []), found), page)
    return RunResult(
        kind=FAMILY.name,
        folder=folder.root,
        model=list(members.values())[-1].model,
        report=page,
        evaluation=found,
        stages=[stage for member in members.values() for stage in member.stages],
        members=members,
    )


def _follow(recipe: Recipe, base: Path, folder: RunFolder) -> None:
    """Do the work of a torchrun's other processes."""
    assert recipe.cascade is not None
    do, models = following(folder), list[Path]()
    ancestors = tuple(origins_of(_find(recipe, base)))
    for hop in recipe.cascade.hops:
        member = member_recipe(recipe, hop, models[-1] if models else None)
        job = replace(find_job(member, base), ancestors=ancestors)
        _, stages = run_steps(LANGUAGE_MODEL, job, do)
        models.append(stages["train"].path / MODEL)
    if recipe.cascade.from_scratch is not None:
        first = find_job(first_member(recipe), base)
        job, _ = run_steps(LANGUAGE_MODEL, first, do, only=DATA_STEPS)
        train_from_scratch(recipe, job, do, models[0])


def _members(
    recipe: Recipe, base: Path, folder: RunFolder, ancestors: tuple[Origin, ...]
) -> dict[str, RunResult]:
    assert recipe.cascade is not None
    members: dict[str, RunResult] = {}
    parent = None
    for number, hop in enumerate(recipe.cascade.hops, 1):
        note(f"--- {hop.name} ({number} of {len(recipe.cascade.hops)}) ---")
        links = folder.linked_from(folder.root / hop.name)
        member = member_recipe(recipe, hop, parent)
        job = replace(find_job(member, base), ancestors=ancestors)
        members[hop.name] = lead(LANGUAGE_MODEL, member, base, links, job)
        parent = members[hop.name].stage("train").path / MODEL
    return members


def _require_members(job: Job) -> Iterator[Finding]:
    """Check every member's exports, and estimate its size."""
    recipe = job.family
    assert recipe is not None
    assert recipe.cascade is not None
    members = planned_members(recipe, job)
    exported = members[-1:] if recipe.cascade.ship == "last" else members
    yield from export_findings(recipe, job, exported)
    teacher = config_size(configs(job)[1]).parameters
    for name, config in members:
        size = config_size(config).parameters
        text = f"{name}: {size / 1e6:,.1f}M parameters, {size / teacher:.0%} of the teacher's"
        yield Finding("estimate", "cascade", text)


def _evaluation(recipe: Recipe, members: Mapping[str, RunResult]) -> FamilyEvaluation:
    assert recipe.cascade is not None
    first = next(iter(members.values()))
    cut = _cut_teacher(first)
    rows: list[Member] = []
    counted: set[Path] = set()
    for name, result in members.items():
        own = [stage for stage in result.stages if stage.path not in counted]
        counted.update(stage.path for stage in own)
        shape = dict(result.stage("student").summary["pruning"]["changed"])
        if cut is not None and (not rows or recipe.cascade.start == "original"):
            shape["vocabulary"] = cut.tokens
        evaluation, student = result.evaluation, _result(result.evaluation, "student")
        rows.append(
            Member(
                name=name,
                untrained=_result(evaluation, "untrained"),
                student=student,
                shape=shape,
                report=f"{name}/report.html",
                tokens=result.stage("train").cost.tokens,
                flops=sum(stage.cost.flops for stage in own if stage.name in PRODUCING),
                seconds=sum(stage.cost.seconds for stage in own if stage.name in PRODUCING),
                quantized=evaluation.result("quantized_trained") or evaluation.result("quantized"),
                decoding=student.decoding_speedup(evaluation.result("teacher")),
            )
        )
    return FamilyEvaluation(
        teacher=_result(first.evaluation, "teacher"),
        members=rows,
        chained=recipe.cascade.start == "previous",
        generations=_generations(members),
        learned_from=recipe.cascade.teacher,
        watts=assumed_watts(),
        cut=cut,
    )


def _cut_teacher(result: RunResult) -> CutTeacher | None:
    # If several models were cut, the first is the teacher.
    stage = next((stage for stage in result.stages if stage.name == "vocabulary"), None)
    if stage is None:
        return None
    found = stage.summary
    perplexity = None
    if "cut_perplexity" in found:
        perplexity = found["teacher_perplexity"], found["cut_perplexity"]
    return CutTeacher(tuple(found["vocabulary"]), tuple(found["parameters"]), perplexity)


def _generations(members: Mapping[str, RunResult]) -> list[Generation]:
    """Collect each prompt's answers: the teacher's, and every member's by name."""
    answers: dict[str, dict[str, str]] = {}
    for name, result in members.items():
        for generation in result.evaluation.generations:
            found = answers.setdefault(generation.prompt, {})
            if "teacher" in generation.answers:  # a sharded teacher does not answer
                found.setdefault("teacher", generation.answers["teacher"])
            found[name] = generation.answers["student"]
    return [Generation(prompt, found) for prompt, found in answers.items()]


def _result(evaluation: Evaluation, role: str) -> ModelResult:
    found = evaluation.result(role)
    assert found is not None
    return found


def _planned(job: Job) -> list[RunModels]:
    assert job.family is not None
    return planned_models(job.family, job)


_OF_ALL_MEMBERS: dict[str, dict[str, Any]] = {
    "export": {"require": _require_members},
    "train": {
        "require": partial(require_resources, find=_planned),
        "check": partial(check_resources, find=_planned),
    },
}

FAMILY = Kind(
    name="family",
    find=_find,
    find_to_check=lambda recipe, base: replace(
        find_models(first_member(recipe), base, weights=False), family=recipe
    ),
    steps=tuple(
        replace(step, **_OF_ALL_MEMBERS.get(step.name, {})) for step in LANGUAGE_MODEL.steps
    ),
    links=LANGUAGE_MODEL.links,
    load_evaluation=LANGUAGE_MODEL.load_evaluation,
    preview=lambda recipe, base, rows: LANGUAGE_MODEL.preview(first_member(recipe), base, rows),
    lead=_lead,
    follow=_follow,
)
