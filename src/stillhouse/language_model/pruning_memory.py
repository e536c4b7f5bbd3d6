"""The memory of pruning a student and of searching for its shape."""

from __future__ import annotations

from dataclasses import replace

from stillhouse.language_model.run_models import RunModels
from stillhouse.planning.machine import Machine
from stillhouse.planning.model_size import config_size
from stillhouse.planning.stage_estimate import StageEstimate
from stillhouse.planning.step_memory import (
    CONTEXT_BYTES,
    LIBRARIES_BYTES,
    WIDE,
    Memory,
    training_memory,
)
from stillhouse.planning.training_step import training_step
from stillhouse.pruning.offload import LARGE_BYTES
from stillhouse.signals.lm_head import CHUNK_LOGITS
from stillhouse.students.pruned_student import STREAMS, layers_on_device, moment_bytes
from stillhouse.students.student_config import PrunedStudent

KL_BUFFERS = 5
"""The number of logit-sized buffers per chunk in `summed_kl`."""


def pruning_estimate(models: RunModels, section: PrunedStudent, machine: Machine) -> StageEstimate:
    """Estimate the `student` stage, in which the processes divide the calibration rows."""
    own = -(-section.calibration_tokens // machine.processes)
    memory, note = _pruning(models, section, machine, own)
    return StageEstimate(
        models.stage("student"),
        memory,
        processes=machine.processes,
        disk=float(WIDE * config_size(models.student).parameters),
        scratch=_scratch(models, machine),
        note=note,
    )


def _scratch(models: RunModels, machine: Machine) -> float:
    """Estimate the disk space of offloaded models. A node's processes share the layers until each
    cuts them."""
    start, student = config_size(models.start), config_size(models.student)
    if WIDE * start.parameters < LARGE_BYTES:
        return 0.0
    if machine.processes == 1:
        return float(WIDE * start.parameters)
    each = machine.processes * (start.ends + student.parameters)
    return float(WIDE * (machine.nodes * (start.parameters - start.ends) + each))


def search_estimate(models: RunModels, section: PrunedStudent, machine: Machine) -> StageEstimate:
    """Estimate the `search` stage, in which each process prunes its own candidates on all
    calibration rows and trains the best for a few steps, entirely in memory."""
    search, settings = section.search, models.recipe.train
    student, teacher = config_size(models.student), config_size(models.teacher)
    calibration = min(search.calibration_tokens, section.calibration_tokens)
    memory, note = _pruning(models, section, machine, calibration)
    scratch = _scratch(models, machine)
    if search.trained > 1:
        step = training_step(
            models.student,
            (),
            windows=settings.batch_size,
            context=models.recipe.data.context,
            accumulates=False,
            compute=machine.compute(settings.precision),
            device=machine.device,
        )
        trained = training_memory(step, "none", over=1, processes=1)
        tokens = search.winner_steps * settings.batch_size * models.recipe.data.context
        rows = float(WIDE * (tokens * teacher.hidden + teacher.head))
        trained = trained.plus("teacher's rows and head", rows)
        trained = replace(trained, phase="training a candidate")
        memory = max(memory, trained, key=lambda each: each.total)
        scratch += float(WIDE * student.parameters * search.trained)
    return StageEstimate(
        models.stage("search"), memory, processes=machine.processes, scratch=scratch, note=note
    )


def _pruning(
    models: RunModels, section: PrunedStudent, machine: Machine, tokens: int
) -> tuple[Memory, str]:
    """Estimate the memory of pruning on so many calibration tokens, and note where it happens."""
    start, size = config_size(models.start), config_size(models.student)
    weights = float(WIDE * start.parameters)
    logits = min(CHUNK_LOGITS, start.hidden // 2 * start.vocabulary)
    work = {
        "calibration": float(WIDE * STREAMS * tokens * start.hidden),
        "moments": float(moment_bytes(models.start)),
        "logits": float(KL_BUFFERS * WIDE * logits),
    }
    parts = {"weights": weights, **work, "libraries": LIBRARIES_BYTES}
    if weights >= LARGE_BYTES:
        parts["weights"] = float(WIDE * (2 * start.layer + start.ends))
    else:
        # The pages of both checkpoints and the gaps between the cut weights stay until the end.
        ends_stay = (size.hidden, size.vocabulary) == (start.hidden, start.vocabulary)
        cut = size.parameters - (size.ends if ends_stay else 0)
        parts |= {"cut weights": float(WIDE * cut), "saved student": float(WIDE * size.parameters)}
        parts["heap"] = sum(work.values())
    if machine.device == "cpu":
        return Memory("pruning", parts), "on the CPU"
    ways = {"": weights}
    if (copies := layers_on_device(section)) is not None:
        ways["a layer at a time"] = float(WIDE * (copies * start.layer + start.ends))
    for note, there in ways.items():
        on_gpu = {"weights": there, **work, "context": CONTEXT_BYTES}
        if sum(on_gpu.values()) <= machine.memory:
            return Memory("pruning", on_gpu, host=parts), note
    return Memory("pruning", {}, host=parts), "on the CPU"
