"""The kind of run that trains one language model: its steps, in order."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import RenderableType

from stillhouse.data.preview import preview
from stillhouse.evaluation.results import Evaluation
from stillhouse.language_model.api_signals_stage import plan_api_signals
from stillhouse.language_model.data_check import check_data
from stillhouse.language_model.data_stage import open_data, plan_data
from stillhouse.language_model.evaluate_stage import plan_evaluation, plan_teacher
from stillhouse.language_model.expected_time import expected_seconds
from stillhouse.language_model.export_check import require_exports
from stillhouse.language_model.export_stage import (
    EXPORT_PURPOSE,
    PUSH,
    plan_export,
    plan_language_model_report,
    shipped_folder,
)
from stillhouse.language_model.job import Job, find_models
from stillhouse.language_model.model_check import require_models
from stillhouse.language_model.quantize_stage import plan_quantization, plan_quantized_training
from stillhouse.language_model.recipe import Recipe
from stillhouse.language_model.roots_stage import has_other_tokenizers, plan_roots, with_roots
from stillhouse.language_model.run_check import check_resources, ready_to_train, require_resources
from stillhouse.language_model.search_stage import has_target, plan_search, with_sizes
from stillhouse.language_model.signals_stage import STORE, plan_signals, records_signals
from stillhouse.language_model.synthesis_check import (
    check_synthesis,
    require_synthesis,
    synthesis_spending,
)
from stillhouse.language_model.synthesis_stage import (
    makes_text,
    require_text,
    synthesis_plan,
    with_text,
)
from stillhouse.language_model.train_stage import (
    plan_baseline,
    plan_cut,
    plan_student,
    plan_training,
)
from stillhouse.language_model.vocabulary_stage import cut_job, find_job, plan_vocabulary
from stillhouse.pipeline.engine import run_steps, stages_of
from stillhouse.pipeline.kind import Kind, Link, Step
from stillhouse.pipeline.report_stage import REPORT, report_step
from stillhouse.runfolder import Stage, StagePlan
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.training.train import MODEL


def _plan_store(job: Job, data: Stage, student: Stage) -> StagePlan:
    """Plan a store that is filled by the teacher or from log-probabilities in an API's answers."""
    section = job.recipe.signals
    if section is not None and section.answers is not None:
        return plan_api_signals(job)
    return plan_signals(job, data, student)


STEPS = (
    Step(
        "synthesis",
        lambda job: synthesis_plan(job.recipe, job.base),
        applies=lambda job: makes_text(job.recipe, job.base),
        then=with_text,
        require=require_synthesis,
        check=check_synthesis,
        spending=synthesis_spending,
        purpose="generate training text with the teacher",
    ),
    Step(
        "data",
        plan_data,
        then=ready_to_train,
        require=require_models,
        check=check_data,
        purpose="split the text into token windows, and hold some out for evaluation",
    ),
    Step(
        "vocabulary",
        plan_vocabulary,
        ("data",),
        applies=lambda job: job.after_cut is not None,
        then=cut_job,
        purpose="remove the tokens from the teacher that the text does not need",
    ),
    Step(
        "data",
        plan_data,
        applies=lambda job: job.cut or job.after_cut is not None,
        then=ready_to_train,
    ),
    Step(
        "roots",
        plan_roots,
        ("data",),
        applies=has_other_tokenizers,
        then=with_roots,
        purpose="match the tokens of teachers with other tokenizers to the student's",
    ),
    Step(
        "search",
        plan_search,
        ("data",),
        applies=has_target,
        then=with_sizes,
        purpose="prune and briefly train several shapes to find the best one for the target",
    ),
    Step(
        "student",
        plan_student,
        ("data",),
        purpose="build the smaller model that training starts from",
    ),
    Step(
        "cut",
        plan_cut,
        ("data",),
        applies=lambda job: job.recipe.evaluate.cut_baseline,
        purpose="build the same student without its refit to measure what the refit gains",
    ),
    Step(
        "signals",
        _plan_store,
        ("data", "student"),
        applies=records_signals,
        purpose="cache the teacher's outputs so that they are computed only once",
    ),
    Step(
        "train",
        plan_training,
        ("data", "student", "signals"),
        require=require_resources,
        check=check_resources,
        purpose="distill: train the student to match the teacher's next-token probabilities",
    ),
    Step(
        "baseline",
        plan_baseline,
        ("data", "student"),
        applies=lambda job: job.recipe.evaluate.fine_tuning_baseline,
        purpose="train the same student without the teacher to measure what distillation gains",
    ),
    Step(
        "quantize",
        plan_quantization,
        ("data", "train"),
        applies=lambda job: job.recipe.quantize is not None,
        purpose="round the trained weights with scales that fit each layer's inputs",
    ),
    Step(
        "qat",
        plan_quantized_training,
        ("data", "train", "quantize", "signals"),
        applies=lambda job: job.recipe.quantize is not None and job.recipe.quantize.qat is not None,
        purpose="distill with rounded weights to recover what rounding cost",
    ),
    Step(
        "teacher",
        plan_teacher,
        ("data",),
        applies=lambda job: bool(job.ancestors),  # a family's member
        purpose="evaluate the teacher once for all members",
    ),
    Step(
        "evaluate",
        plan_evaluation,
        ("data", "student", "train", "cut", "baseline", "teacher", "quantize", "qat"),
        purpose="compare every model with the teacher on the held-out text",
    ),
    Step(
        "export",
        plan_export,
        ("data", "evaluate", "train", "quantize", "qat"),
        main_process=True,
        require=require_exports,
        purpose=EXPORT_PURPOSE,
    ),
    PUSH,
    report_step(plan_language_model_report),
)
WINDOW_STEPS = ("synthesis", "data", "vocabulary")
DATA_STEPS = (*WINDOW_STEPS, "roots")
"""The steps up to the windows, the teacher with their vocabulary, and the roots."""
CHECKPOINT = "checkpoint"
"""The link to the trained student, before quantization and export."""


def links(job: Job) -> dict[str, Link]:
    exported = {name: ("export", name) for name in map(shipped_folder, job.recipe.export.formats)}
    stores = {"signals": ("signals", STORE), "synthesis": ("synthesis", ""), "roots": ("roots", "")}
    trained = {CHECKPOINT: ("train", MODEL)}
    return {**exported, **trained, REPORT: ("report", REPORT), **stores}


def preview_windows(recipe: Recipe, base: Path, rows: int) -> RenderableType:
    """Render training windows, colored by loss mask, running the data stage first if necessary."""
    require_text(recipe, base)
    with stages_of(recipe) as do:
        job, stages = run_steps(LANGUAGE_MODEL, find_job(recipe, base), do, only=WINDOW_STEPS)
    windows, _ = open_data(stages["data"])
    return preview(windows, load_tokenizer(job.tokenizer), rows)


LANGUAGE_MODEL = Kind(
    name="language model",
    find=find_job,
    find_to_check=partial(find_models, weights=False),
    steps=STEPS,
    links=links,
    load_evaluation=Evaluation.load,
    preview=preview_windows,
    expected_seconds=expected_seconds,
)
