"""Checks of a classification recipe before anything is spent: requirements and estimates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from stillhouse import account
from stillhouse.classify.classifier_students import planned_parameters
from stillhouse.classify.classify_config import ClassifyRecipe, PretrainedClassifier
from stillhouse.classify.classify_job import TaskJob
from stillhouse.classify.fit import planned_steps, texts_each
from stillhouse.classify.label_judgment import estimate_judgment
from stillhouse.classify.label_prompts import LabelPrompt, PromptTokens, prompt_tokens
from stillhouse.classify.label_scoring import label_tree, shared_prefix
from stillhouse.classify.task_texts import Texts, prepare_texts
from stillhouse.errors import RecipeError
from stillhouse.export.licenses import license_lines
from stillhouse.export.onnx_export import require_onnx
from stillhouse.export.push import require_token
from stillhouse.finding import Finding
from stillhouse.generation.answer_requests import findings
from stillhouse.generation.generation_config import may_cost
from stillhouse.generation.source_check import (
    FrameKeys,
    rendered_prompt,
    require_key,
    require_template,
)
from stillhouse.hardware import choose_precision, default_device, matmul_rate
from stillhouse.launch import world_size
from stillhouse.pipeline.engine import has_finished
from stillhouse.pipeline.kind import Check
from stillhouse.tasks.labeled_texts import FEWEST
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.planned_model import (
    check_model_folder,
    learned_positions,
    planned_model,
    trained_positions,
)

EFFICIENCY = 0.35
"""Fraction of the measured matrix product rate that scoring, with its small batches, reaches."""
FEW = 20
"""Number of training texts per label below which `check` warns."""


def require_task(job: TaskJob) -> Iterator[Finding]:
    """Check the teacher before any request: an API's key, or a model's chat template and context
    length for the task's prompt. Raises StillhouseError."""
    section, task = job.recipe.teacher, job.recipe.task
    texts_each(job.recipe.train, world_size())
    texts = job.texts
    prompt = job.prompt(texts)
    if section.api is not None:
        if estimate_judgment(job.recipe, prompt, texts, job.journal).missing:
            yield from require_key(section.api, "teacher")
        return
    assert job.teacher is not None
    config = check_model_folder(job.teacher)
    tokenizer = load_tokenizer(job.teacher)
    words = prompt_tokens(prompt, tokenizer, job.recipe.data.max_tokens)
    if task.chat:
        require_template(
            rendered_prompt(tokenizer),
            [(prompt.turns("a text"), "the task's prompt")],
            whose="the teacher",
            where=job.teacher.path,
            keys=FrameKeys.of("task", task.system, task.examples),
        )
    yield from _positions("teacher", config, words, texts)


def require_student(job: TaskJob) -> Iterator[Finding]:
    """Raise StillhouseError for a model that the student cannot be built from."""
    section, source, texts = job.recipe.student, job.student, job.texts
    if isinstance(section, PretrainedClassifier) and section.head == "words":
        tokenizer = load_tokenizer(source)
        words = prompt_tokens(job.prompt(texts), tokenizer, job.recipe.data.max_tokens)
        yield from _positions("student", load_config(source), words, texts)
    else:
        planned_parameters(section, source, list(texts.labels))


LONGEST = 64
"""Number of texts, the longest in bytes, that are assumed to include the longest in tokens."""


def _positions(name: str, config: Any, words: PromptTokens, texts: Texts) -> Iterator[Finding]:
    """Raise RecipeError if a prompt and its answer exceed the model's table of positions."""
    longest = sorted((row.text for row in texts.all), key=lambda text: len(text.encode()))
    length = max(map(len, words.of(longest[-LONGEST:]))) + max(map(len, words.labels))
    most, trained = learned_positions(planned_model(config)), trained_positions(config)
    fix = "lower data.max_tokens, to which texts are cut, or shorten task.prompt and its examples"
    if most is not None and length > most:
        raise RecipeError(
            f"a prompt with its answer has {length:,} tokens, but the {name} {most:,} positions",
            where="task.prompt",
            fix=fix,
        )
    if most is None and trained is not None and length > trained:
        text = f"a prompt with its answer has {length:,} tokens, but the {name} was trained with "
        yield Finding("warning", "context", text + f"{trained:,} (max_position_embeddings)", fix)


def check_texts(check: Check) -> Iterator[Finding]:
    job: TaskJob = check.job
    texts = job.texts
    yield Finding("ok", "labels", f"{len(texts.labels)}: {', '.join(list(texts.labels)[:12])}")
    parts = f"{len(texts.train):,} to learn from, {len(texts.calibration):,} for the threshold, "
    parts += f"{len(texts.test):,} to measure on"
    repeated = f"; {texts.repeated:,} duplicates are left out" if texts.repeated else ""
    yield Finding("ok", "texts", parts + repeated)
    yield from (Finding("warning", "labels", note) for note in texts.notes)
    if len(texts.train) < FEW * len(texts.labels):
        few = f"there are only {len(texts.train):,} training texts for {len(texts.labels)} labels"
        yield Finding("warning", "texts", few, "add more texts: they need no labels")
    yield from _gold(job, texts)


def check_judgment(check: Check) -> Iterator[Finding]:
    """Report the time that scoring takes on this machine, or the cost of an API's requests."""
    job: TaskJob = check.job
    prompt = job.prompt(job.texts)
    yield Finding("ok", "teacher", job.described)
    if job.teacher is None:
        estimate = estimate_judgment(job.recipe, prompt, job.texts, job.journal, check.calls)
        yield from findings(estimate, job.journal, "judgment")
    else:
        yield _local_cost(job, prompt, job.texts)


def check_training(check: Check) -> Iterator[Finding]:
    job: TaskJob = check.job
    section = job.recipe.train
    steps = planned_steps(section, len(job.texts.train))
    yield Finding("estimate", "training", f"{steps:,} steps of {section.batch_size} texts")


def require_classifier_export(job: TaskJob) -> Iterator[Finding]:
    """Raise StillhouseError for formats and uploads that would fail."""
    recipe = job.recipe
    if recipe.export.formats != ["safetensors"]:
        labels = list(job.texts.labels)
        require_onnx(planned_parameters(recipe.student, job.student, labels))
    if recipe.export.push_to_hub is not None and not has_finished(recipe, "push"):
        require_token(recipe.export.push_to_hub)
    yield from license_lines(job.made_with)
    yield Finding("ok", "export", ", ".join(recipe.export.formats))


def _gold(job: TaskJob, texts: Texts) -> Iterator[Finding]:
    """Report how many texts have reference labels, if only some do."""
    known, learned = (sum(row.gold is not None for row in p) for p in (texts.test, texts.train))
    if known < FEWEST:
        few = f"only {known:,} of the {len(texts.test):,} test texts have reference labels"
        unknown = few if known else "the test texts have no reference labels"
        unknown += ", so the student is compared only with the teacher"
        part = "test" if job.recipe.data.test else "texts"
        fix = f"set data.{part}.0.label to the column of their labels"
        yield Finding("warning", "texts", unknown, fix)
    elif known < len(texts.test):
        some = f"{known:,} of the {len(texts.test):,} test texts have reference labels"
        yield Finding("ok", "texts", some)
    if FEWEST <= learned < len(texts.train):
        text = f"the fine-tuned student learns from {learned:,} texts with reference labels"
        yield Finding("ok", "texts", text)


def _local_cost(job: TaskJob, prompt: LabelPrompt, texts: Texts) -> Finding:
    assert job.teacher is not None
    recipe = job.recipe
    words = prompt_tokens(prompt, load_tokenizer(job.teacher), recipe.data.max_tokens)
    sample = words.of([row.text for row in texts.all[:200]])
    shared, inner = shared_prefix(sample), label_tree(words.labels).inner
    each = sum(map(len, sample)) / len(sample) - shared + inner
    tokens = round(each * len(texts.all)) + shared
    device = default_device()
    precision = choose_precision(recipe.teacher.precision, device)
    model = planned_model(load_config(job.teacher), job.teacher.path)
    flops = account.forward_flops(account.count_parameters(model).active, tokens)
    seconds = flops / (EFFICIENCY * matmul_rate(precision.dtype, device))
    pairs = len(texts.all) * len(words.labels)
    text = (
        f"{tokens:,} tokens for {pairs:,} pairs of text and label, about {seconds:,.0f} s "
        f"({precision.reason}); {shared:,} tokens of the prompt are read once"
    )
    return Finding("estimate", "judgment", text)


def judgment_spending(job: TaskJob) -> Iterator[str]:
    """Describe what the judgment would cost without a budget."""
    teacher = job.recipe.teacher
    if may_cost(teacher.api, teacher.budget):
        texts = job.texts
        estimate = estimate_judgment(job.recipe, job.prompt(texts), texts, job.journal)
        if estimate.missing:
            yield estimate.described()


def preview_task(recipe: ClassifyRecipe, base: Path, rows: int) -> RenderableType:
    """Show the teacher's prompts for the first texts, and its possible answers."""
    texts = prepare_texts(recipe, base)
    prompt = LabelPrompt.of(recipe.task, texts.labels)
    parts: list[RenderableType] = []
    for row in texts.train[:rows]:
        parts.append(Rule(row.where, style="dim", align="left"))
        if recipe.task.chat:
            for turn in prompt.turns(row.text):
                parts.append(Text.assemble((f"{turn['role']}: ", "dim"), turn["content"]))
        else:
            parts.append(Text(prompt.plain(row.text)))
    answers = [prompt.answer_for(label) for label in texts.labels]
    parts.append(Rule("answers that are scored", style="dim", align="left"))
    parts.append(Text(" | ".join(answers), style="bold green"))
    return Group(*parts)
