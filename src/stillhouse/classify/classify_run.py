"""A classifier's run: its stages in order, each done once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.classify import classifier_evaluation as measuring
from stillhouse.classify import classifier_export as products
from stillhouse.classify import classify_stages as stages
from stillhouse.classify.classifier_students import student_source
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.classify.classify_job import TaskJob
from stillhouse.classify.fit import MODEL
from stillhouse.config.load import load_any_recipe
from stillhouse.errors import RecipeError
from stillhouse.evaluate.classification import ClassificationEvaluation
from stillhouse.run_paths import answers_path
from stillhouse.runfolder import RunFolder, Stage
from stillhouse.stages.evaluate_stage import EVALUATION
from stillhouse.stages.export_stage import push_exports, shipped_folder
from stillhouse.stages.locked_folder import locked_folder, refuse_torchrun
from stillhouse.stages.report_stage import REPORT
from stillhouse.stages.stage_plan import redone, telling, unanswered
from stillhouse.teachers.model_source import resolve_model


@dataclass(frozen=True)
class TaskResult:
    """Where a classifier's run has its products."""

    folder: Path
    model: Path
    report: Path
    evaluation: ClassificationEvaluation
    stages: list[Stage]


def run_task(
    recipe: ClassifyRecipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> TaskResult:
    """Runs a recipe with the section `task`. Finished stages are not done again.

    base: where relative paths start; by default the recipe file's folder, or the working one.
    Raises StillhouseError; what is finished by then stays.
    """
    if not isinstance(recipe, ClassifyRecipe):
        base = base or Path(recipe).parent
        recipe = task_recipe(recipe, overrides)
    base = base or Path.cwd()
    refuse_torchrun()
    with locked_folder(recipe) as folder:
        return _lead(recipe, base, folder)


def task_recipe(path: str | Path, overrides: Sequence[str] = ()) -> ClassifyRecipe:
    """Raises RecipeError where the recipe has no task."""
    recipe = load_any_recipe(path, overrides)
    if not isinstance(recipe, ClassifyRecipe):
        raise RecipeError("the recipe has no section `task`", where=path, fix="see docs/tasks.md")
    return recipe


def find_task(recipe: ClassifyRecipe, base: Path) -> TaskJob:
    """Finds the models. Raises ModelError."""
    section = recipe.teacher
    teacher = None
    if section.model is not None:
        teacher = resolve_model(section.model, revision=section.revision, base=base)
    student = student_source(recipe.student, teacher, base)
    return TaskJob(recipe, base, teacher, student, answers_path(recipe))


def _lead(recipe: ClassifyRecipe, base: Path, folder: RunFolder) -> TaskResult:
    finished: list[Stage] = []
    do = telling(folder, finished)
    texts = do(stages.texts(recipe, base))
    job = find_task(recipe, base)
    judged = do(redone(folder, stages.judgment(job, texts), unanswered))
    student = do(stages.student(job, texts))
    trained = do(stages.training(job, texts, judged, student))
    plan = stages.baseline(job, texts, student)
    tuned = None if plan is None else do(plan)
    evaluated = do(measuring.evaluation(job, texts, judged, student, trained, tuned))
    exported = do(products.export(job, texts, trained, evaluated))
    hub = recipe.export.push_to_hub
    if hub is not None:
        do(push_exports(hub, exported, recipe.export.formats, recipe.name))
    report = do(products.report(job, list(finished)))
    for form in {"safetensors", *recipe.export.formats}:
        folder.point(shipped_folder(form), exported.path / shipped_folder(form))
    folder.point(REPORT, report.path / REPORT)
    return TaskResult(
        folder=folder.root,
        model=folder.root / MODEL,
        report=folder.root / REPORT,
        evaluation=ClassificationEvaluation.load(evaluated.path / EVALUATION),
        stages=finished,
    )
