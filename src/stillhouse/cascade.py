"""A family: prune and distill in turn, every member the start of the next smaller one.

The mathematics is in `pruning` and `training`; here is only the order. All members share one
folder of stages, so that the data are made once, the teacher's signals are scored once, and a hop
that is finished is not done again when another one is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.config.members import first_member, member_recipe
from stillhouse.config.recipe import Recipe
from stillhouse.errors import RecipeError
from stillhouse.evaluate.results import Evaluation, Generation, ModelResult
from stillhouse.export.licenses import Origin
from stillhouse.from_scratch import measured_curve, scratch_account
from stillhouse.hardware import assumed_watts, leads, tune_allocator
from stillhouse.job import find_models, planned_members
from stillhouse.progress import note
from stillhouse.report.family_page import CutTeacher, FamilyReport, Member, write_family_report
from stillhouse.runfolder import RunFolder, Stage, write_atomically
from stillhouse.runner import RunResult, follow, lead, read, run_folder, taking_part
from stillhouse.stages.locked_folder import locked_folder
from stillhouse.stages.model_origins import origins_of
from stillhouse.stages.stage_plan import doing
from stillhouse.training.train import MODEL

REPORT, REPORT_DATA = "family.html", "family.json"
PRODUCING = (
    "synthesis",
    "data",
    "vocabulary",
    "signals",
    "search",
    "student",
    "train",
    "quantize",
    "qat",
)
"""Stages that make a member; the others measure it and write it down."""


@dataclass(frozen=True)
class FamilyResult:
    """members: by name, the largest first. report: the page about all of them."""

    folder: Path
    members: dict[str, RunResult]
    report: Path


def run_cascade(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> FamilyResult | None:
    """Runs every hop of a recipe's `cascade`, then writes the family's report.

    Arguments, torchrun and errors as `stillhouse.run`; each member's model and report are in a
    folder of its name.
    """
    recipe, base = read(recipe, overrides, base)
    if recipe.cascade is None:
        raise RecipeError(
            "this recipe has no cascade",
            where="cascade",
            fix="add the section with its hops, or use stillhouse run",
        )
    tune_allocator()
    # A later hop that cannot be is refused before the first one is paid for.
    first = find_models(first_member(recipe), base)
    planned_members(recipe, first)
    if not leads():
        folder = run_folder(recipe)
        models: list[Path] = []
        for hop in recipe.cascade.hops:
            parent = models[-1] if models else None
            models.append(follow(member_recipe(recipe, hop, parent), base, folder).path / MODEL)
        if recipe.cascade.from_scratch is not None:
            measured_curve(recipe, base, taking_part(folder), models[0])
        return None
    with locked_folder(recipe) as folder:
        members = _members(recipe, base, folder, origins_of(first))
        report = _report(recipe, members)
        if recipe.cascade.from_scratch is not None:
            largest = _stage(next(iter(members.values())), "train").path / MODEL
            curve = measured_curve(recipe, base, doing(folder), largest)
            report = replace(report, scratch=scratch_account(curve, report.members))
        write_atomically(folder.root / REPORT_DATA, report.to_json())
        write_family_report(report, folder.root / REPORT)
    return FamilyResult(folder.root, members, folder.root / REPORT)


def _members(
    recipe: Recipe, base: Path, folder: RunFolder, ancestors: Sequence[Origin]
) -> dict[str, RunResult]:
    assert recipe.cascade is not None
    members: dict[str, RunResult] = {}
    parent = None
    for number, hop in enumerate(recipe.cascade.hops, 1):
        note(f"--- {hop.name} ({number} of {len(recipe.cascade.hops)}) ---")
        links = RunFolder(folder.root, links=folder.root / hop.name)
        result = lead(member_recipe(recipe, hop, parent), base, links, ancestors)
        members[hop.name] = result
        parent = _stage(result, "train").path / MODEL
    return members


def _report(recipe: Recipe, members: Mapping[str, RunResult]) -> FamilyReport:
    assert recipe.cascade is not None
    rows: list[Member] = []
    counted: set[Path] = set()
    for name, result in members.items():
        own = [stage for stage in result.stages if stage.path not in counted]
        counted.update(stage.path for stage in own)
        evaluation = result.evaluation
        rows.append(
            Member(
                name=name,
                untrained=_result(evaluation, "untrained"),
                student=_result(evaluation, "student"),
                shape=_cut_here(result, first=not rows or recipe.cascade.start == "original"),
                report=f"{name}/report.html",
                tokens=_stage(result, "train").cost.tokens,
                flops=sum(stage.cost.flops for stage in own if stage.name in PRODUCING),
                seconds=sum(stage.cost.seconds for stage in own if stage.name in PRODUCING),
                quantized=evaluation.result("quantized_trained") or evaluation.result("quantized"),
                decoding=_decoding(evaluation),
            )
        )
    first = next(iter(members.values()))
    return FamilyReport(
        title=recipe.name,
        teacher=_result(first.evaluation, "teacher"),
        members=rows,
        chained=recipe.cascade.start == "previous",
        generations=_generations(members),
        learned_from=recipe.cascade.teacher,
        watts=assumed_watts(),
        cut=_cut_teacher(first),
    )


def _cut_teacher(result: RunResult) -> CutTeacher | None:
    stage = _cutting(result)
    if stage is None:
        return None
    found = stage.summary
    perplexity = None
    if "cut_perplexity" in found:
        perplexity = found["teacher_perplexity"], found["cut_perplexity"]
    return CutTeacher(tuple(found["vocabulary"]), tuple(found["parameters"]), perplexity)


def _cutting(result: RunResult) -> Stage | None:
    """The stage that took tokens from the teacher; the first of several models'."""
    return next((stage for stage in result.stages if stage.name == "vocabulary"), None)


def _cut_here(result: RunResult, *, first: bool) -> dict[str, tuple[int, int]]:
    """Sizes before and after. first: the member before it is the teacher with all its tokens."""
    shape = dict(_stage(result, "student").summary["pruning"]["changed"])
    cut = _cutting(result)
    if first and cut is not None:
        shape["vocabulary"] = tuple(cut.summary["vocabulary"])
    return shape


def _generations(members: Mapping[str, RunResult]) -> list[Generation]:
    """Each prompt's answers: the teacher's, and every member's by its name."""
    answers: dict[str, dict[str, str]] = {}
    for name, result in members.items():
        for generation in result.evaluation.generations:
            found = answers.setdefault(generation.prompt, {})
            found.setdefault("teacher", generation.answers["teacher"])
            found[name] = generation.answers["student"]
    return [Generation(prompt, found) for prompt, found in answers.items()]


def _decoding(evaluation: Evaluation) -> float | None:
    """The student's speed over the teacher's: members are measured at different times."""
    teacher, student = (_result(evaluation, role).speed for role in ("teacher", "student"))
    if teacher is None or student is None:
        return None
    return student.decode_tokens_per_s / teacher.decode_tokens_per_s


def _stage(result: RunResult, name: str) -> Stage:
    return next(stage for stage in result.stages if stage.name == name)


def _result(evaluation: Evaluation, role: str) -> ModelResult:
    found = evaluation.result(role)
    assert found is not None
    return found
