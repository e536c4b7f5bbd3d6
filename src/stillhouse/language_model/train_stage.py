"""The stages that build a student and train it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.checksums import sha
from stillhouse.hardware import peak_memory_bytes
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import Job
from stillhouse.language_model.roots_stage import roots_key
from stillhouse.language_model.signals_stage import StoredSignals, stored_signals, training_teacher
from stillhouse.objectives.objective_config import LogitsTerm, ObjectiveRecipe
from stillhouse.pipeline.stage_plan import model_check
from stillhouse.pruning.offload import shared_layers
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.shared_work import ALONE, all_processes
from stillhouse.students.build_student import build_student, config_sha256
from stillhouse.students.student import Student
from stillhouse.students.student_config import PrunedStudent, RandomStudent
from stillhouse.training.checkpoints import CHECKPOINTS
from stillhouse.training.own_prompts import OwnPrompts, read_own_prompts
from stillhouse.training.rollouts import ROLLOUTS
from stillhouse.training.train import MODEL, TrainingResult, shards, train
from stillhouse.training.train_config import training_key

NOT_OF_STUDENTS = {"search", "target", "model", "config", "tokenizer", "removed_tokens"}
BASELINE = ObjectiveRecipe(terms=[LogitsTerm(divergence="cross_entropy")])


def plan_student(job: Job, data: Stage) -> StagePlan:
    section = job.recipe.student
    pruned = isinstance(section, PrunedStudent)

    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        teacher = job.pruned or job.teacher
        processes = all_processes() if pruned else ALONE
        with shared_layers(teacher, processes):
            summary = build_student(
                section,
                teacher=teacher,
                windows=windows,
                heldout=heldout,
                seed=job.recipe.seed,
                base=job.base,
                out=out / MODEL,
                processes=processes,
                same_tokens=not job.folded,
            )
        flops = summary.get("flops", 0)
        return Outcome(flops=flops, peak_memory_bytes=peak_memory_bytes(), summary=summary)

    inputs = {
        # Once a shape is found, neither the search settings nor the models' locations matter. The
        # models' content is identified below, and the teachers' in the training.
        "recipe": section.model_dump(mode="json", exclude=NOT_OF_STUDENTS),
        "config": config_sha256(section, job.base) if isinstance(section, RandomStudent) else None,
        "seed": job.recipe.seed,
        "teacher": job.teacher.fingerprint,
        "pretrained": job.pretrained and job.pretrained.fingerprint,
        "pruned": job.pruned and job.pruned.fingerprint,
        "tokenizer": job.tokenizer.fingerprint,
        "data": data.digest,
    }
    check = model_check(job.start)
    return StagePlan("student", inputs, work, version=8, together=pruned, check=check)


def plan_cut(job: Job, data: Stage) -> StagePlan:
    """Plan the same student without its refit, as a baseline."""
    cut = job.recipe.student.model_copy(update={"refit": False, "local_distillation": None})
    job = replace(job, recipe=job.recipe.model_copy(update={"student": cut}))
    return replace(plan_student(job, data), name="cut")


def plan_training(job: Job, data: Stage, student: Stage, signals: Stage | None) -> StagePlan:
    """Plan the distillation. signals: this run's stage that recorded the teacher's signals."""
    stored = stored_signals(job, signals)
    inputs: dict[str, Any] = {"objective": job.recipe.objective.model_dump(mode="json")}
    if stored is not None:
        inputs["signals"] = stored.key
    return _training("train", inputs, job, data, student, stored)


def plan_baseline(job: Job, data: Stage, student: Stage) -> StagePlan:
    """Plan training the same student on the same data with a plain next-token loss, as a
    baseline."""
    settings = job.recipe.train.model_copy(update={"on_policy": None})
    alone = job.recipe.model_copy(update={"train": settings, "objective": BASELINE})
    return _training("baseline", {}, replace(job, recipe=alone, teachers=()), data, student)


def _training(
    name: str,
    inputs: dict[str, Any],
    job: Job,
    data: Stage,
    student: Stage,
    stored: StoredSignals | None = None,
) -> StagePlan:
    return StagePlan(
        name,
        {**inputs, **training_inputs(job, data), "student": student.digest},
        partial(run_training, job, data, student, stored),
        version=2,
        resumable=True,
        together=True,
        scratch=(CHECKPOINTS, ROLLOUTS),
        check=model_check(job.start),
    )


def training_inputs(job: Job, data: Stage) -> dict[str, Any]:
    """Return what every training depends on besides its student and its objective."""
    return {
        **_own_prompts_key(job),
        "recipe": training_key(job.recipe.train),
        "seed": job.recipe.seed,
        "teachers": [teacher.fingerprint for teacher in job.teachers],
        **(roots_key(job) if job.teachers else {}),
        "data": data.digest,
    }


def run_training(
    job: Job,
    data: Stage,
    student: Stage,
    stored: StoredSignals | None,
    out: Path,
    *,
    run: Callable[..., TrainingResult] = train,
) -> Outcome:
    """Train a stage's student on the job's data. run: `train`, or a function with the same
    arguments."""
    windows, heldout = open_data(data)
    start = starting_student(job, student)
    result = run(
        start,
        training_teacher(job, stored, start),
        windows,
        job.recipe.objective,
        job.recipe.train,
        heldout=heldout,
        seed=job.recipe.seed,
        folder=out,
        prompts=own_prompts(job, start.tokenizer),
        base=job.base,
    )
    return Outcome(
        tokens=result.tokens,
        flops=result.flops,
        peak_memory_bytes=result.peak_memory_bytes,
        seconds=result.seconds,
        summary=result.summary(),
    )


def own_prompts(job: Job, tokenizer: Any) -> OwnPrompts | None:
    """Read the prompts that the recipe names; None if the data's chats are the prompts. tokenizer:
    the student's. Raises DataError."""
    section = job.recipe.train.on_policy
    if section is None or section.prompts is None:
        return None
    return read_own_prompts(section.prompts, job.base, tokenizer)


def _own_prompts_key(job: Job) -> dict[str, str]:
    section = job.recipe.train.on_policy
    if section is None or section.prompts is None or section.prompts.path is None:
        return {}
    return {"prompts": sha(job.base / section.prompts.path)}


def starting_student(job: Job, stage: Stage) -> Student:
    """Load the student to train. If it will be sharded, each process later reads only its part of
    the weights, unless the LM head is frozen, which every process needs whole.

    job: one whose `train.shard` is no longer `auto`.
    """
    settings = job.recipe.train
    if shards(settings, "student") > 1 and not settings.freeze_head:
        return Student.without_weights(job.model(stage))
    return Student.load(job.model(stage))
