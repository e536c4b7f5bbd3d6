"""The stages that quantize the trained student and continue to train it quantized."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from stillhouse.hardware import peak_memory_bytes
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import Job
from stillhouse.language_model.signals_stage import stored_signals
from stillhouse.language_model.train_stage import run_training, training_inputs
from stillhouse.pipeline.stage_plan import model_check
from stillhouse.quantize.quantize import TRAINING, quantize, train_quantized
from stillhouse.runfolder import Outcome, Stage, StagePlan


def plan_quantization(job: Job, data: Stage, trained: Stage) -> StagePlan:
    """Plan rounding the trained student's matrices to a grid, except those that measurements
    exclude."""
    section = job.recipe.quantize
    assert section is not None

    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        result = quantize(
            job.model(trained),
            out,
            section=section,
            heldout=heldout,
            vocabulary=job.vocabulary,
            seed=job.recipe.seed,
            windows=windows,
        )
        return Outcome(peak_memory_bytes=peak_memory_bytes(), summary=asdict(result))

    inputs = {
        "recipe": section.model_dump(mode="json", exclude={"qat"}),
        "seed": job.recipe.seed,
        "vocabulary": job.vocabulary,
        "data": data.digest,
        "trained": trained.digest,
    }
    return StagePlan("quantize", inputs, work, version=2, check=model_check(job.start))


def plan_quantized_training(
    job: Job, data: Stage, student: Stage, rounded: Stage, signals: Stage | None
) -> StagePlan:
    """Plan quantization-aware distillation, which continues with rounded weights."""
    section = job.recipe.quantize
    stored = stored_signals(job, signals)
    assert section is not None
    assert section.qat is not None

    def work(out: Path) -> Outcome:
        run = partial(train_quantized, quantized=rounded.path, section=section)
        trained = run_training(job, data, student, stored, out, run=run)
        return replace(trained, summary={**rounded.summary, "training": trained.summary})

    inputs = {
        **training_inputs(job, data),
        "qat": section.qat.model_dump(mode="json"),
        "objective": job.recipe.objective.model_dump(mode="json"),
        "signals": stored and stored.key,
        "trained": student.digest,
        "rounded": rounded.digest,
    }
    check, scratch = model_check(job.start), (TRAINING,)
    return StagePlan(
        "qat", inputs, work, resumable=True, together=True, scratch=scratch, check=check
    )
