"""A run that trains a model to answer texts with JSON or free text: its stages, in order.

The teacher's answers become chats, and the stages of a language-model run train the student on
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from stillhouse.answering.answer_stages import plan_answer_texts, plan_answers
from stillhouse.answering.answering_check import (
    answers_spending,
    check_answer_student,
    check_answer_texts,
    check_answers,
    comparison_spending,
    preview_answers,
    require_answering,
)
from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.answering.answering_evaluation import plan_answers_evaluation
from stillhouse.answering.answering_export import (
    answers_predictor,
    plan_answers_export,
    plan_answers_report,
)
from stillhouse.answering.answering_job import GOLD, AnsweringJob, find_answering, training_recipe
from stillhouse.evaluation.answers import AnswersEvaluation
from stillhouse.language_model.data_stage import plan_data
from stillhouse.language_model.export_stage import EXPORT_PURPOSE
from stillhouse.language_model.job import Job, find_models
from stillhouse.language_model.roots_stage import has_other_tokenizers, plan_roots, with_roots
from stillhouse.language_model.run_check import require_text_for_all
from stillhouse.language_model.search_stage import has_target, plan_search, with_sizes
from stillhouse.language_model.train_stage import plan_baseline, plan_student, plan_training
from stillhouse.language_model.training_memory import with_shard
from stillhouse.pipeline.kind import Kind, Link, Step
from stillhouse.pipeline.report_stage import REPORT, report_step
from stillhouse.pipeline.stage_plan import Do
from stillhouse.runfolder import Stage, StagePlan, run_root
from stillhouse.training.train import MODEL

Then = Callable[[AnsweringJob, Mapping[str, Stage], Do], AnsweringJob]


def _find(recipe: AnsweringRecipe, base: Path) -> AnsweringJob:
    # Problems with the student's model must be found before requests are sent.
    find_models(training_recipe(recipe, run_root(recipe)), base)
    return find_answering(recipe, base)


def _with_chats(job: AnsweringJob, stages: Mapping[str, Stage], _do: Do) -> AnsweringJob:
    """Add the language-model jobs, now that the chats to train on exist."""
    answers = stages["answers"]
    training = find_models(training_recipe(job.recipe, answers.path), job.base)
    gold = None
    if job.recipe.evaluate.fine_tuning_baseline and answers.summary["gold"]:
        gold = replace(training, recipe=training_recipe(job.recipe, answers.path, GOLD))
    return replace(job, training=with_shard(training), gold=gold and with_shard(gold))


def _training_then(then: Callable[[Job, Mapping[str, Stage], Do], Job]) -> Then:
    """Adapt `Step.then` of a stage of the language-model job."""

    def of_answers(job: AnsweringJob, stages: Mapping[str, Stage], do: Do) -> AnsweringJob:
        assert job.training is not None
        return replace(job, training=then(job.training, stages, do))

    return of_answers


def _on_answers(plan: Callable[..., StagePlan]) -> Callable[..., StagePlan]:
    """Adapt a stage of the language-model job that trains on the teacher's answers."""
    return lambda job, *stages: plan(job.training, *stages)


def _with_text_for_all(step: str) -> Then:
    """After a step that makes windows, raise RecipeError if there are fewer than processes."""

    def then(job: AnsweringJob, stages: Mapping[str, Stage], _do: Do) -> AnsweringJob:
        require_text_for_all(job.recipe, job.recipe.train, stages[step])
        return job

    return then


def _plan_training(job: AnsweringJob, data: Stage, student: Stage) -> StagePlan:
    assert job.training is not None
    if job.recipe.learns_text_alone:
        return replace(plan_baseline(job.training, data, student), name="train")
    return plan_training(job.training, data, student, None)


def _has_roots(job: AnsweringJob) -> bool:
    """Whether the teacher has a different tokenizer, and more than its text is learned."""
    found = job.training
    return found is not None and not job.recipe.learns_text_alone and has_other_tokenizers(found)


STEPS = (
    Step(
        "texts",
        plan_answer_texts,
        require=require_answering,
        check=check_answer_texts,
        purpose="read the texts, and set some aside for tests",
    ),
    Step(
        "answers",
        plan_answers,
        ("texts",),
        then=_with_chats,
        check=check_answers,
        spending=answers_spending,
        purpose="let the teacher answer every text",
    ),
    Step(
        "data",
        _on_answers(plan_data),
        then=_with_text_for_all("data"),
        purpose="cut the answers into windows of tokens",
    ),
    Step(
        "gold_data",
        lambda job: replace(plan_data(job.gold), name="gold_data"),
        then=_with_text_for_all("gold_data"),
        applies=lambda job: job.gold is not None,
        purpose="cut the reference answers into windows of tokens",
    ),
    Step(
        "roots",
        _on_answers(plan_roots),
        ("data",),
        applies=_has_roots,
        then=_training_then(with_roots),
        purpose="match the tokens of the teacher and the student",
    ),
    Step(
        "search",
        _on_answers(plan_search),
        ("data",),
        applies=lambda job: job.training is not None and has_target(job.training),
        then=_training_then(with_sizes),
        purpose="prune and briefly train several shapes, to find the best for the target",
    ),
    Step(
        "student",
        _on_answers(plan_student),
        ("data",),
        check=check_answer_student,
        purpose="build the smaller model that training starts from",
    ),
    Step(
        "train",
        _plan_training,
        ("data", "student"),
        purpose="train the student on the teacher's answers",
    ),
    Step(
        "baseline",
        lambda job, data, student: plan_baseline(job.gold, data, student),
        ("gold_data", "student"),
        applies=lambda job: job.gold is not None,
        purpose="train the same student on the reference answers, for comparison",
    ),
    Step(
        "evaluate",
        plan_answers_evaluation,
        ("texts", "answers", "student", "train", "baseline"),
        spending=comparison_spending,
        purpose="compare the students' answers with the teacher's on the test texts",
    ),
    Step(
        "export",
        plan_answers_export,
        ("texts", "data", "train", "evaluate"),
        main_process=True,
        purpose=EXPORT_PURPOSE,
    ),
    report_step(plan_answers_report),
)


def _links(_job: AnsweringJob) -> dict[str, Link]:
    return {MODEL: ("export", MODEL), REPORT: ("report", REPORT)}


EXTRACT = Kind(
    name="extract",
    find=_find,
    find_to_check=find_answering,
    steps=STEPS,
    links=_links,
    load_evaluation=AnswersEvaluation.load,
    preview=preview_answers,
    predictor=answers_predictor,
)
GENERATE = replace(EXTRACT, name="generate")
