"""Estimates the time of every stage of a language-model run on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

from stillhouse import account
from stillhouse.errors import DataError
from stillhouse.hardware import Requested
from stillhouse.language_model.data_stage import expected_tokens
from stillhouse.language_model.job import Job, full_job
from stillhouse.language_model.recipe import Recipe
from stillhouse.language_model.run_models import RunModels, run_models
from stillhouse.language_model.synthesis_stage import synthesis_job
from stillhouse.language_model.training_memory import is_small
from stillhouse.pipeline.time_left import Expected
from stillhouse.planning.machine import Machine, this_machine
from stillhouse.planning.model_size import config_size
from stillhouse.runfolder import Stage
from stillhouse.students.student_config import PrunedStudent
from stillhouse.synthesis.synthesize import estimate_synthesis
from stillhouse.synthesis.synthesize_config import JudgeChoice
from stillhouse.training.train import plan_batches

PRUNING_PASSES = 3.0
"""The cost of one calibration token, including the refit, in full-model forward passes."""
ROUNDING_SECONDS = 1e-7
"""Seconds to choose one weight's scale, on one process."""
BYTES_PER_SECOND = 1e10
"""Speed of reading weights to generate a token on a CPU."""
REPLAY_TOKENS = 1500
"""Tokens that a replay compares and generates, for each of two models."""
LIBRARIES_SECONDS = 5.0
"""Seconds to start a process that imports torch and transformers."""
UNKNOWN = frozenset(("synthesis", "search", "push"))
"""Steps whose time depends on measurements along the way, an API, or a network."""


def expected_seconds(job: Job, names: Sequence[str], finished: Sequence[Stage]) -> Expected:
    """Estimate the seconds of the named stages, in order; empty while they are unknown.

    They are unknown until the length of the training text is known, while a step in `UNKNOWN` is
    still ahead, and for models that are too small to estimate.
    """
    done = {stage.name: stage for stage in finished}
    unknown = set(UNKNOWN)
    recipe = full_job(job).recipe
    if recipe.signals is not None and not recipe.signals.local:
        unknown.add("signals")
    if _writes_here(recipe):
        unknown.remove("synthesis")
    if any(name in unknown and name not in done for name in names):
        return {}
    tokens = None
    if "data" in done:
        tokens = int(done["data"].summary["train"]["tokens"])
    else:
        with suppress(DataError):
            tokens = expected_tokens(job.recipe.data, job.base)
    models = run_models(job)
    if tokens is None or is_small(models, this_machine(job.recipe.train.products, timed=False)):
        return {}
    machine = _timed(job.recipe.train.products)
    found = {name: _seconds(name, models, machine, tokens) for name in names}
    return found | ({"synthesis": _synthesis(job, models, machine)} if "synthesis" in names else {})


def _writes_here(recipe: Recipe) -> bool:
    """Whether the recipe's own teacher generates the answers, and the prompts are known."""
    section = recipe.synthesize
    if section is None or section.teacher.local is None or section.prompts.write is not None:
        return False
    return section.teacher.local.model is None and not isinstance(
        section.filters.best_of, JudgeChoice
    )


def _synthesis(job: Job, models: RunModels, machine: Machine) -> float:
    """Estimate the seconds of generating the missing answers, all at maximum length."""
    section, teacher = job.recipe.synthesize, config_size(models.teacher)
    assert section is not None
    assert section.teacher.local is not None
    answers = estimate_synthesis(synthesis_job(job.recipe, job.base)).missing
    longest = section.sampling.max_tokens
    rate = (machine.rate or 1.0) * machine.processes
    batches = -(-answers // section.teacher.local.batch)
    weights = batches * longest * _read_again(teacher.active, models, machine)
    return account.forward_flops(teacher.active, answers * longest) / rate + weights


def _read_again(active: float, models: RunModels, machine: Machine) -> float:
    """Seconds to read so many parameters from memory, once per generated token."""
    speed = BYTES_PER_SECOND if machine.device == "cpu" else math.inf
    return machine.compute(models.recipe.train.precision).itemsize * active / speed


@cache
def _timed(precision: Requested) -> Machine:
    return this_machine(precision, timed=True)


def _seconds(name: str, models: RunModels, machine: Machine, tokens: int) -> float:
    recipe, student = models.recipe, config_size(models.student)
    rate = (machine.rate or 1.0) * machine.processes
    windows, quantize = max(1, -(-tokens // recipe.data.context)), recipe.quantize
    if name in ("student", "cut") and isinstance(recipe.student, PrunedStudent):
        start = config_size(models.start).active
        passed = account.forward_flops(start, recipe.student.calibration_tokens)
        return PRUNING_PASSES * passed / rate
    if name == "signals":
        return account.forward_flops(config_size(models.teacher).active, tokens) / rate
    if name == "train":
        return _training(models, windows) / rate
    if name == "baseline":
        return _training(models.alone, windows) / rate
    if name == "quantize" and quantize is not None:
        read = (quantize.calibration_tokens or 0) + 2 * quantize.sensitivity_tokens
        scales = ROUNDING_SECONDS * student.parameters
        return account.forward_flops(student.active, read) / rate + scales
    if name == "qat" and quantize is not None and quantize.qat is not None:
        return _training(models.in_quantized_training(windows), windows) / rate
    if name == "evaluate":
        return _evaluation(models, machine, rate)
    if name == "export":
        compared = 2 * account.forward_flops(student.active, REPLAY_TOKENS) / rate
        return len(recipe.export.formats) * (compared + 2 * LIBRARIES_SECONDS)
    return LIBRARIES_SECONDS


def _training(models: RunModels, windows: int) -> int:
    """Estimate the FLOPs of training."""
    settings = models.recipe.train
    steps = plan_batches(settings, windows, 1).steps
    return models.training_flops(steps * settings.batch_size * models.recipe.data.context)


def _evaluation(models: RunModels, machine: Machine, rate: float) -> float:
    """Estimate the seconds of evaluating every model on held-out text and prompts, and of measuring
    speed and memory in a separate process for each shape."""
    section, active = models.recipe.evaluate, models.measured_active
    written = len(section.prompts) * section.max_new_tokens
    answers = written * _read_again(active, models, machine)
    alone = 2 * 2 * LIBRARIES_SECONDS if section.speed else 0.0
    read = account.forward_flops(active, models.recipe.data.heldout_tokens) / rate
    return read + answers + alone
