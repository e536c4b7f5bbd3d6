"""An answering run: its own stages around the ordinary ones that train a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stillhouse.answering import answer_stages as asking
from stillhouse.answering import answering_evaluation as measuring
from stillhouse.answering import answering_export as products
from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.answering.answering_job import (
    GOLD,
    AnsweringJob,
    find_answering,
    training_recipe,
)
from stillhouse.config.load import load_any_recipe
from stillhouse.errors import RecipeError
from stillhouse.evaluate.answers import AnswersEvaluation
from stillhouse.job import Job, find_models
from stillhouse.runfolder import RunFolder, Stage
from stillhouse.stages.data_stage import plan_data
from stillhouse.stages.evaluate_stage import EVALUATION
from stillhouse.stages.locked_folder import locked_folder, refuse_torchrun
from stillhouse.stages.report_stage import REPORT
from stillhouse.stages.stage_plan import Do, StagePlan, redone, telling, unanswered
from stillhouse.stages.train_stage import plan_baseline, plan_student, plan_training
from stillhouse.training.train import MODEL


@dataclass(frozen=True)
class AnsweringResult:
    """Where an answering run has its products."""

    folder: Path
    model: Path
    report: Path
    evaluation: AnswersEvaluation
    stages: list[Stage]


def run_answering(
    recipe: AnsweringRecipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> AnsweringResult:
    """Runs a recipe with a task of kind extract or generate. Finished stages are not done again.

    base: where relative paths start; by default the recipe file's folder, or the working one.
    Raises StillhouseError; what is finished by then stays.
    """
    if not isinstance(recipe, AnsweringRecipe):
        base = base or Path(recipe).parent
        recipe = answering_recipe(recipe, overrides)
    base = base or Path.cwd()
    refuse_torchrun()
    with locked_folder(recipe) as folder:
        return _lead(recipe, base, folder)


def answering_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnsweringRecipe:
    """Raises RecipeError where the recipe has no such task."""
    recipe = load_any_recipe(path, overrides)
    if not isinstance(recipe, AnsweringRecipe):
        raise RecipeError(
            "the recipe has no task of kind extract or generate",
            where=path,
            fix="see docs/tasks.md",
        )
    return recipe


def _lead(recipe: AnsweringRecipe, base: Path, folder: RunFolder) -> AnsweringResult:
    finished: list[Stage] = []
    do = telling(folder, finished)
    asked = find_answering(recipe, base)
    texts = do(asking.texts(asked))
    # What is wrong with the student's model is found before a teacher is paid.
    find_models(training_recipe(recipe, folder.root), base)
    answers = do(redone(folder, asking.answers(asked, texts), unanswered))
    job = find_models(training_recipe(recipe, answers.path), base)
    data = do(plan_data(job))
    student = do(plan_student(job, data))
    trained = do(_training(job, asked, data, student))
    tuned = _fine_tuned(job, asked, answers, student, do)
    evaluated = do(measuring.evaluation(asked, texts, answers, student, trained, tuned))
    exported = do(products.export(asked, texts, data, trained, evaluated))
    report = do(products.report(asked, list(finished)))
    folder.point(MODEL, exported.path / MODEL)
    folder.point(REPORT, report.path / REPORT)
    return AnsweringResult(
        folder=folder.root,
        model=folder.root / MODEL,
        report=folder.root / REPORT,
        evaluation=AnswersEvaluation.load(evaluated.path / EVALUATION),
        stages=finished,
    )


def _training(job: Job, asked: AnsweringJob, data: Stage, student: Stage) -> StagePlan:
    if asked.recipe.learns_text_alone:
        return replace(plan_baseline(job, data, student), name="train")
    return plan_training(job, data, student, None)


def _fine_tuned(
    job: Job, asked: AnsweringJob, answers: Stage, student: Stage, do: Do
) -> Stage | None:
    """The same student trained on the true answers of the same texts; None where there are none."""
    wanted = asked.recipe.evaluate.fine_tuning_baseline
    if not wanted or not answers.summary["gold"]:
        return None
    recipe = training_recipe(asked.recipe, answers.path, GOLD)
    truly = replace(job, recipe=recipe)
    data = do(replace(plan_data(truly), name="gold_data"))
    return do(plan_baseline(truly, data, student))
