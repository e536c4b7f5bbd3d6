"""Checks of an extract or generate recipe before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.answering.answering_evaluation import load_scorer
from stillhouse.answering.answering_job import AnsweringJob, find_answering, training_recipe
from stillhouse.answering.comparison_judge import comparison_source
from stillhouse.export.licenses import license_lines
from stillhouse.finding import Finding
from stillhouse.generation.answer_requests import estimate_cost, findings
from stillhouse.generation.chat_frame import user_turn
from stillhouse.generation.estimate import Estimate
from stillhouse.generation.generation_config import may_cost
from stillhouse.generation.source_check import (
    FrameKeys,
    rendered_training,
    require_source,
    require_template,
)
from stillhouse.language_model.data_check import check_turns
from stillhouse.language_model.job import configs, find_models
from stillhouse.language_model.model_check import require_models
from stillhouse.language_model.on_policy_check import require_on_policy
from stillhouse.launch import world_size
from stillhouse.pipeline.engine import has_finished
from stillhouse.pipeline.kind import Check
from stillhouse.planning.model_size import config_size
from stillhouse.runfolder import run_root
from stillhouse.synthesis.judge_answers import most_requests
from stillhouse.synthesis.synthesize import chosen_filters
from stillhouse.synthesis.synthesize_config import JudgeChoice
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.training.train import plan_batches

FEW = 50
"""Number of training texts below which `check` warns."""


def require_answering(job: AnsweringJob) -> Iterator[Finding]:
    """Check all requirements before any request is sent: keys or packages, filters, the scorer,
    judges, and chat templates that accept the prompts. Raises StillhouseError."""
    recipe, base = job.recipe, job.base
    plan_batches(recipe.train, recipe.train.batch_size, world_size())
    chosen_filters(recipe.filters, base, "filters")
    if recipe.evaluate.scorer is not None:
        load_scorer(recipe.evaluate.scorer, base)
    ordinary = find_models(training_recipe(recipe, run_root(recipe)), base)
    yield from require_models(ordinary)
    yield from require_on_policy(ordinary)
    keys = FrameKeys.of("task", recipe.task.system, recipe.task.examples)
    if _estimate(job).missing:
        prompts = [(job.teacher_messages("a text"), "the task's prompt")]
        source = job.source()
        yield from require_source(source, prompts, whose="the teacher", key="teacher", keys=keys)
        choice = job.judge()
        if choice is not None:
            key = "filters.best_of.teacher"
            yield from require_source(choice.teacher, _VERDICT, whose="the judge", key=key)
    comparing = comparison_source(job)
    if comparing is not None and not has_finished(recipe, "evaluate"):
        key = "evaluate.judge"
        yield from require_source(comparing, _VERDICT, whose="the judge", key=key)
    require_template(
        rendered_training(load_tokenizer(ordinary.tokenizer)),
        [(job.student_messages("a text"), "the task's prompt")],
        whose="the student",
        where=ordinary.tokenizer.path,
        keys=keys,
    )


_VERDICT = [(user_turn("Which is better?"), "the judge's question")]


def check_answer_texts(check: Check) -> Iterator[Finding]:
    job: AnsweringJob = check.job
    recipe, texts = job.recipe, job.texts
    parts = f"{len(texts.train):,} to learn from, {len(texts.test):,} to measure on"
    repeated = f"; {texts.repeated:,} duplicates are left out" if texts.repeated else ""
    yield Finding("ok", "texts", parts + repeated)
    if len(texts.train) < FEW:
        few = f"there are only {len(texts.train):,} training texts"
        yield Finding("warning", "texts", few, "add more texts: they need no answers")
    if recipe.evaluate.scorer is not None:
        yield Finding("ok", "scorer", recipe.evaluate.scorer)
    yield Finding("ok", "teacher", job.described)


def check_answer_student(check: Check) -> Iterator[Finding]:
    """Report the student's size, and the licenses of the models that it is made from."""
    job: AnsweringJob = check.job
    recipe = job.recipe
    ordinary = find_models(training_recipe(recipe, run_root(recipe)), job.base)
    student, teacher = (config_size(config) for config in configs(ordinary))
    size = f"{student.parameters / 1e6:,.1f}M parameters"
    if not recipe.learns_text_alone:
        size += f" ({student.parameters / teacher.parameters:.0%} of the teacher's)"
    yield Finding("estimate", "student", size)
    yield from check_turns(ordinary)
    yield from license_lines(job.made_with)


def check_answers(check: Check) -> Iterator[Finding]:
    """Report the cost of the answers, and warnings about them."""
    job: AnsweringJob = check.job
    recipe = job.recipe
    estimate = _estimate(job, check.calls)
    yield from findings(estimate, job.journal, "answers", "questions")
    choice, samples = recipe.filters.best_of, recipe.teacher.samples
    if verdicts := most_requests(choice, samples * len(job.texts.train), samples):
        yield Finding("estimate", "judge", f"at most {verdicts:,} requests to the judge")
    if recipe.teacher_sees_more and not recipe.learns_text_alone:
        text = (
            "the student learns the teacher's distributions without its examples or system prompt"
        )
        fix = "remove objective to learn only the answers' text, or set task.student_sees: all"
        yield Finding("warning", "objective", text, fix)


def answers_spending(job: AnsweringJob) -> Iterator[str]:
    """Describe what the answers, including a judge, would cost without a budget."""
    teacher, choice = job.recipe.teacher, job.recipe.filters.best_of
    if may_cost(teacher.api, teacher.budget):
        estimate = _estimate(job)
        if estimate.missing:
            yield estimate.described()
    if isinstance(choice, JudgeChoice) and may_cost(choice.teacher.api, choice.budget):
        yield "the judge chooses among the answers to each training text"


def comparison_spending(job: AnsweringJob) -> Iterator[str]:
    """Describe what comparing the answers would cost without a budget."""
    judge = job.recipe.evaluate.judge
    if judge is not None and may_cost(judge.api, judge.budget):
        yield "the judge compares the answers to all test texts"


def _estimate(job: AnsweringJob, calls: int = 0) -> Estimate:
    source = job.source()
    return estimate_cost(source, job.requests(source, job.texts), job.journal, calls)


def preview_answers(recipe: AnsweringRecipe, base: Path, rows: int) -> RenderableType:
    """Show the teacher's prompts for the first texts; what the student does not see is dimmed."""
    job = find_answering(recipe, base)
    texts = job.texts
    parts: list[RenderableType] = []
    for row in texts.train[:rows]:
        parts.append(Rule(row.where, style="dim", align="left"))
        seen = job.student_messages(row.text)
        for turn in job.teacher_messages(row.text):
            style = "" if turn in seen else "dim"
            parts.append(Text.assemble((f"{turn['role']}: ", "dim"), (turn["content"], style)))
    return Group(*parts)
