"""The stage that searches for a pruned student's shape if the recipe has a target, not sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillhouse.hardware import default_device, machine, peak_memory_bytes
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import Job, full_job
from stillhouse.pipeline.stage_plan import Do
from stillhouse.pruning.offload import shared_layers
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.search.search_shape import WORK, Setting, search_shape
from stillhouse.shared_work import all_processes
from stillhouse.students.student_config import PrunedStudent

SHORT_TRAINING = ("learning_rate", "betas", "weight_decay", "max_grad_norm", "batch_size")
"""The keys of the recipe's `train` that apply to short distillations."""


def has_target(job: Job) -> bool:
    student = full_job(job).recipe.student
    return isinstance(student, PrunedStudent) and student.target is not None


def plan_search(job: Job, data: Stage) -> StagePlan:
    section = job.recipe.student
    assert isinstance(section, PrunedStudent)

    def work(out: Path) -> Outcome:
        windows, _ = open_data(data)
        device, processes = default_device(), all_processes()
        setting = Setting(
            section=section,
            train=job.recipe.train,
            start=job.start,
            # A teacher with a different tokenizer does not measure what pruning costs.
            teacher=job.start if job.folded else job.teacher,
            windows=windows,
            vocabulary=job.vocabulary,
            seed=job.recipe.seed,
            dtype=job.precision.dtype,
            served=job.served,
            device=device,
            out=out,
            processes=processes,
        )
        with shared_layers(job.start, processes):
            found = search_shape(setting)
        return Outcome(
            tokens=found.tokens,
            flops=found.flops,
            seconds=found.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            summary={
                "sizes": found.sizes,
                "described": found.described,
                "feasible": len(found.candidates),
                "pruned": sum(one.one_shot_kl is not None for one in found.candidates),
                "trained": sum(bool(one.trained_kl) for one in found.candidates),
            },
        )

    inputs = _inputs(job, data, section)
    return StagePlan(
        "search", inputs, work, version=2, resumable=True, together=True, scratch=(WORK,)
    )


def _inputs(job: Job, data: Stage, section: PrunedStudent) -> dict[str, Any]:
    assert section.target is not None
    return {
        # The pruned model is identified by its fingerprint, wherever it is.
        "recipe": section.model_dump(mode="json", exclude={"model"}),
        "train": {key: getattr(job.recipe.train, key) for key in SHORT_TRAINING},
        "precision": job.recipe.train.precision,
        "dtype": job.recipe.export.dtype,
        "seed": job.recipe.seed,
        "teacher": job.teacher.fingerprint,
        "pruned": job.pruned and job.pruned.fingerprint,
        "data": data.digest,
        # Measurements from another machine do not apply to this one; the main process measures.
        "machine": machine()["cpu"] if section.target.measured else None,
    }


def with_sizes(job: Job, stages: Mapping[str, Stage], _do: Do) -> Job:
    """Return the job with the sizes that the search found instead of the target."""
    section = job.recipe.student
    student = section.model_copy(update={**stages["search"].summary["sizes"], "target": None})
    return replace(job, recipe=job.recipe.model_copy(update={"student": student}))
