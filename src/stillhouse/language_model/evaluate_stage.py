"""The stages that evaluate the teacher, and the students against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse import account
from stillhouse.checksums import sha
from stillhouse.data.windows import WindowSet
from stillhouse.evaluation.evaluate import evaluate
from stillhouse.evaluation.evaluate_config import EvaluateRecipe, LmEvalRecipe
from stillhouse.evaluation.kept_teacher import KeptTeacher
from stillhouse.evaluation.results import EVALUATION
from stillhouse.hardware import peak_memory_bytes
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import Job
from stillhouse.language_model.roots_stage import roots_key, teacher_alignment
from stillhouse.language_model.signals_stage import sharded_loader
from stillhouse.launch import leads
from stillhouse.quantize.quantization import FILE, Quantization
from stillhouse.runfolder import Outcome, Stage, StagePlan, run_root

MEASURED_ALONE = ("prompts", "max_new_tokens", "temperature", "lm_eval")
"""The keys of the recipe's `evaluate` section that the teacher's own measurements depend on."""


def plan_teacher(job: Job, data: Stage) -> StagePlan:
    """Plan measuring the teacher once for all members of a family."""

    def work(out: Path) -> Outcome:
        _, heldout = open_data(data)
        alone = job.recipe.evaluate.model_copy(update={"speed": False, "own_text": None})
        (found,) = evaluate(
            {"teacher": job.teacher},
            keep=out,
            vocabulary=job.vocabulary,
            export_dtype=job.served,
            **evaluation_arguments(job, alone, heldout),
        ).models
        tokens = found.fidelity.tokens
        flops = account.forward_flops(found.parameters, tokens)
        return Outcome(tokens, flops, peak_memory_bytes())

    raw = job.recipe.evaluate.model_dump(mode="json")
    inputs = {
        **_inputs(job, data),
        "recipe": {key: raw[key] for key in MEASURED_ALONE},
        "vocabulary": job.vocabulary,
    }
    return StagePlan("teacher", inputs, work, together=True)


def plan_evaluation(
    job: Job,
    data: Stage,
    student: Stage,
    trained: Stage,
    cut: Stage | None,
    baseline: Stage | None,
    teacher: Stage | None,
    *quantized_stages: Stage | None,
) -> StagePlan:
    quantized = [stage for stage in quantized_stages if stage is not None]

    def work(out: Path) -> Outcome:
        _, heldout = open_data(data)
        made = {"untrained": student, "student": trained, "cut": cut, "fine_tuned": baseline}
        models = {"teacher": job.teacher}
        models |= {role: job.model(stage) for role, stage in made.items() if stage is not None}
        sizes, prepare = {}, {}
        for stage in quantized:
            role = {"quantize": "quantized", "qat": "quantized_trained"}[stage.name]
            models[role], sizes[role] = job.model(stage), stage.summary["bytes"]
            prepare[role] = Quantization.load(stage.path / FILE).round_inputs
        found = evaluate(
            models,
            vocabulary=job.vocabulary,
            export_dtype=job.served,
            sizes=sizes,
            prepare=prepare,
            kept=None if teacher is None else KeptTeacher.load(teacher.path),
            **evaluation_arguments(job, job.recipe.measured, heldout),
        )
        if leads():
            found.save(out / EVALUATION)
        results = [one for one in found.models if teacher is None or one.role != "teacher"]
        tokens = sum(one.fidelity.tokens for one in results)
        flops = sum(account.forward_flops(one.parameters, one.fidelity.tokens) for one in results)
        return Outcome(tokens, flops, peak_memory_bytes())

    inputs = {
        **_inputs(job, data),
        "recipe": job.recipe.measured.model_dump(mode="json"),
        "student": student.digest,
        "trained": trained.digest,
        "cut": cut and cut.digest,
        "baseline": baseline and baseline.digest,
        "quantized": [stage.digest for stage in quantized],
    }
    return StagePlan("evaluate", inputs, work, version=4, together=True)


def evaluation_arguments(job: Job, section: EvaluateRecipe, heldout: WindowSet) -> dict[str, Any]:
    """Return the arguments of `evaluate` that all of a job's models share."""
    return {
        "section": section.model_copy(update={"lm_eval": _tasks(job)}),
        "windows": heldout,
        "seed": job.recipe.seed,
        "precision": job.precision,
        "load_sharded": sharded_loader(job, job.teacher),
        "alignment": teacher_alignment(job),
    }


def _tasks(job: Job) -> LmEvalRecipe | None:
    section = job.recipe.evaluate.lm_eval
    return None if section is None else section.located(job.base)


def _inputs(job: Job, data: Stage) -> dict[str, Any]:
    tasks, own = _tasks(job), run_root(job.recipe).resolve()
    files = [] if tasks is None else tasks.task_files()
    return {
        "tasks": [sha(file) for file in files if own not in file.resolve().parents],
        "precision": job.recipe.train.precision,
        "dtype": job.recipe.export.dtype,
        "seed": job.recipe.seed,
        "teacher": job.teacher.fingerprint,
        "data": data.digest,
        **roots_key(job),
    }
