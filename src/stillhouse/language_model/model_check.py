"""Checks a run's models before anything is computed, from their configurations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stillhouse.errors import ModelError, RecipeError, SignalError
from stillhouse.evaluation.generate import prompt_ids
from stillhouse.evaluation.speed import DECODE_TOKENS, PROMPT_TOKENS
from stillhouse.finding import Finding
from stillhouse.generation.chat_frame import user_turn
from stillhouse.generation.source_check import rendered_prompt, require_template
from stillhouse.language_model.job import Job, configs, full_job, planned_objective
from stillhouse.language_model.package_check import require_options
from stillhouse.objectives.objective_config import ChunksTerm
from stillhouse.pruning.pruning_config import VocabularyFile
from stillhouse.pruning.vocabulary_cut import require_listed_tokens
from stillhouse.students.random_student import require_possible, require_rows
from stillhouse.students.student_config import PrunedStudent, RandomStudent
from stillhouse.teachers.activations import final_norm, require_parts
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.planned_model import (
    check_model_folder,
    learned_positions,
    planned_model,
    trained_positions,
)
from stillhouse.teachers.source_tokenizers import shared_vocabulary


def require_models(job: Job) -> Iterator[Finding]:
    """Check all models' folders, positions, and tokenizers, and the templates that
    `evaluate.prompts` needs.

    Raises StillhouseError if something cannot work; yields warnings.
    """
    _require_chunks(job)
    job = full_job(job)
    student = job.recipe.student
    if isinstance(student, RandomStudent) and student.overrides:
        config, _ = configs(job)
        require_possible(config, trusted=job.start.trusted)
        if "vocab_size" in student.overrides:
            require_rows(config, load_tokenizer(job.tokenizer))
    if isinstance(student, PrunedStudent) and isinstance(student.vocabulary, VocabularyFile):
        file = job.base / student.vocabulary.path
        require_listed_tokens(load_tokenizer(job.teacher), file, load_config(job.teacher))
    _require_parts(job)
    for source in dict.fromkeys([job.teacher, *job.teachers]):
        check_model_folder(source)
    if not isinstance(student, RandomStudent):
        _require_trainable(check_model_folder(job.start), job.start)
    yield from require_options(job)
    _require_templates(job)
    for name, config in zip(("student", "teacher"), configs(job), strict=True):
        yield from _positions(name, config, job)
    if not job.folded and job.own_tokenizer is None:
        for warning in shared_vocabulary(job.teacher, job.start).warnings:
            yield Finding("warning", "vocabulary", warning)


def _require_chunks(job: Job) -> None:
    """Raise SignalError if a term on chunks has no teacher that provides their likelihoods."""
    recipe = full_job(job).recipe
    if not any(isinstance(term, ChunksTerm) for term in recipe.objective.terms):
        return
    if recipe.signals is not None:
        found = recipe.signals.answers is not None
        problem, fix = "stored signals have no chunks", "`signals`"
    else:
        folds = job.after_cut is not None  # or other teachers, found later
        found = folds or any(source in job.other_teachers for source in job.teachers)
        problem = "every teacher has the student's tokenizer"
        fix = "add a teacher with a different tokenizer to train.teachers"
    if not found:
        raise SignalError(
            f"a term on chunks compares text that two tokenizers split differently, but {problem}",
            where="objective.terms",
            fix=f"remove the term, or {fix}",
        )


def _require_parts(job: Job) -> None:
    """Raise ModelError or SignalError if a model lacks parts that the terms inside of it need."""
    objective, teacher = planned_objective(job), job.teachers[0]
    if objective.needs.activations:
        model = planned_model(load_config(teacher), trusted=teacher.trusted)
        require_parts(model, objective.needs.activations)
    if objective.student_request:
        student = planned_model(configs(job)[0], trusted=job.start.trusted)
        require_parts(student, objective.student_request)
        if objective.layer_logits:
            final_norm(student)


def _require_trainable(config: Any, source: ModelSource) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the student starts from quantized weights, which cannot be trained",
            where=source.path,
            fix="start from the unquantized model, or from a .gguf file, whose weights are "
            "converted to floats; `quantize` rounds the student after training",
        )


def _positions(name: str, config: Any, job: Job) -> Iterator[Finding]:
    """Check text lengths against the model's positions. Raises RecipeError if a text is longer than
    a learned position table."""
    context, evaluate = job.recipe.data.context, job.recipe.evaluate
    most = learned_positions(planned_model(config))
    lengths = {f"data.context: {context}": context}
    if evaluate.prompts:
        tokenizer = load_tokenizer(job.tokenizer)
        longest = max(len(prompt_ids(tokenizer, prompt)) for prompt in evaluate.prompts)
        key = f"evaluate.prompts with evaluate.max_new_tokens: {evaluate.max_new_tokens}"
        lengths[key] = longest + evaluate.max_new_tokens
    if most is not None:
        for key, length in lengths.items():
            if length > most:
                raise RecipeError(
                    f"{length:,} tokens do not fit into the {name}, which has {most:,} positions",
                    where=key,
                    fix=_shorter(key, context, length, most),
                )
        if evaluate.speed and most < PROMPT_TOKENS + DECODE_TOKENS:
            raise RecipeError(
                f"speed is measured on {PROMPT_TOKENS + DECODE_TOKENS} tokens, but the {name} has "
                f"only {most:,} positions",
                where="evaluate.speed",
                fix="set evaluate.speed: false",
            )
        return
    trained = trained_positions(config)
    if trained is None:
        return
    for key, length in lengths.items():
        if length > trained:
            text = f"{length:,} tokens ({key}) are more than the {trained:,} that the {name} was "
            text += "trained for (max_position_embeddings)"
            yield Finding("warning", "context", text, _shorter(key, context, length, trained))


def _shorter(key: str, context: int, length: int, most: int) -> str:
    if key.startswith("data."):
        return f"set data.context to at most {most}"
    return f"lower evaluate.max_new_tokens by {length - most}, or shorten evaluate.prompts"


def _require_templates(job: Job) -> None:
    chats = [(user_turn(prompt), "evaluate.prompts") for prompt in job.recipe.evaluate.prompts]
    for whose, source in (("the teacher", job.teacher), ("the student", job.tokenizer)):
        tokenizer = load_tokenizer(source)
        if getattr(tokenizer, "chat_template", None):
            require_template(
                rendered_prompt(tokenizer),
                chats,
                whose=whose,
                where=source.path,
                fix="remove evaluate.prompts, each of which is a single user turn; or fix the "
                "chat_template in that folder",
            )
