"""Estimates what every stage of a language-model run takes, from configurations and the number of
training tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from stillhouse.data.data_config import DataRecipe
from stillhouse.data.windows import ARRAYS
from stillhouse.evaluation.fidelity import ROWS_PER_CHUNK, TOKENS_PER_FORWARD
from stillhouse.export.gate import REPLAY_TOKENS
from stillhouse.language_model.pruning_memory import pruning_estimate, search_estimate
from stillhouse.language_model.run_models import RunModels
from stillhouse.language_model.training_memory import (
    cheapest_change,
    planned_training,
    run_shard,
    sharing,
)
from stillhouse.planning.activation_trace import trace_activations
from stillhouse.planning.machine import Machine
from stillhouse.planning.model_size import ModelSize, config_size
from stillhouse.planning.network import step_traffic
from stillhouse.planning.stage_estimate import StageEstimate
from stillhouse.planning.step_memory import (
    COMPILED_BYTES,
    GATHERED_BLOCKS,
    LIBRARIES_BYTES,
    WIDE,
    Memory,
    Shard,
    Step,
    context_bytes,
    training_memory,
)
from stillhouse.pruning.offload import LARGE_BYTES
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.train import require_windows


def plan_stages(models: RunModels, machine: Machine, tokens: int) -> Iterator[StageEstimate]:
    """Estimate the stages that take memory or time, in the order of the run.

    tokens: the number of training tokens. Raises RecipeError if there are more processes than
    windows or they cannot divide the batch.
    """
    recipe = models.recipe
    windows = _windows(recipe.data, tokens, machine)
    if models.first:
        yield StageEstimate("data", Memory("", {}), disk=4.0 * len(ARRAYS) * tokens)  # int32
    section = recipe.student
    if isinstance(section, PrunedStudent) and section.target is not None:
        yield search_estimate(models, section, machine)
    yield _student(models, machine)
    signals = recipe.signals
    if models.first and signals is not None and signals.local:
        yield _signals(models, machine, tokens)
    yield _training("train", models, machine, windows)
    if recipe.evaluate.fine_tuning_baseline:
        yield _training("baseline", models.alone, machine, windows)
    if recipe.quantize is not None:
        yield _quantization(models, machine)
        if recipe.quantize.qat is not None:
            yield _training("qat", models.in_quantized_training(windows), machine, windows)
    if models.member and models.first:
        yield _measured_teacher(models, machine)
    yield _evaluation(models, machine)
    yield _export(models, machine)


def _windows(section: DataRecipe, tokens: int, machine: Machine) -> int:
    windows = max(1, -(-tokens // section.context))
    if section.packing == "isolated":
        require_windows(windows, machine.processes)
    return max(windows, machine.processes)  # one document per window makes more windows


# --- training --------------------------------------------------------------------------------


def _training(name: str, models: RunModels, machine: Machine, windows: int) -> StageEstimate:
    recipe = models.recipe
    settings = recipe.train
    batching, step, shard = planned_training(models, machine, windows)
    over = sharing(settings, machine)
    memory = training_memory(step, shard, over=over, processes=machine.processes)
    if machine.device == "cuda":
        loaded = _loaded(step, shard, over=over, here=min(machine.processes, machine.per_node))
        memory = replace(memory, host={**memory.host, **loaded})
    if name == "qat":
        memory = memory.plus("latent weights", step.weights * step.student.size.parameters)
    tokens = batching.steps * settings.batch_size * recipe.data.context
    size, passes = step.student.size, batching.accumulation
    traffic = step_traffic(step, shard, over=over, machine=machine, micro_batches=passes)
    saved = (step.weights + step.moments) * size.parameters
    text = f"{batching.steps:,} steps of {settings.batch_size} x {recipe.data.context:,} tokens"
    text += f", {batching.micro} window{'s' if batching.micro > 1 else ''} at a time"
    if machine.processes > 1:
        text += f"; sharded: {shard}"
    return StageEstimate(
        name=models.stage(name),
        memory=memory,
        processes=machine.processes,
        tokens=tokens,
        flops=float(models.training_flops(tokens)),
        disk=step.weights * size.parameters,
        scratch=saved * (settings.keep_checkpoints + 1),
        network=traffic.all * batching.steps,
        between_nodes=traffic.between_nodes * batching.steps,
        note=text,
        fix=None if memory.fits(machine.memory) else cheapest_change(models, machine, windows),
    )


def _loaded(step: Step, shard: Shard, *, over: int, here: int) -> dict[str, float]:
    """Estimate what a GPU's process keeps in host memory.

    At first, it has its own copies of the student and of the teachers that are not sharded. It
    reads its part of a sharded student weight by weight. One of the first node's `here` processes
    gathers the trained weights to save them, layer by layer for a large model.
    """
    size = step.student.size
    host = {"student": float(WIDE * size.parameters), "libraries": LIBRARIES_BYTES}
    frozen = step.student.trained < size.parameters  # every process reads a frozen LM head
    if shard in ("student", "both") and not frozen:
        large = WIDE * size.parameters >= LARGE_BYTES
        gathered = max(size.layer, size.ends) if large else size.parameters
        host["student"] = WIDE * size.ends / over + step.weights * gathered / here
    if shard in ("none", "student"):
        host["teachers"] = float(step.compute * step.teacher_parameters)
    return host


# --- the other stages ------------------------------------------------------------------------


def _student(models: RunModels, machine: Machine) -> StageEstimate:
    section, size = models.recipe.student, config_size(models.student)
    disk = float(WIDE * size.parameters)
    if isinstance(section, PrunedStudent):
        return pruning_estimate(models, section, machine)
    parts = {"student weights": disk, "libraries": LIBRARIES_BYTES}
    return StageEstimate(models.stage("student"), Memory("", {}, host=parts), disk=disk)


def _signals(models: RunModels, machine: Machine, tokens: int) -> StageEstimate:
    recipe = models.recipe
    compute = machine.compute(recipe.train.precision)
    size = config_size(models.teacher)
    windows = max(1, Teacher.tokens_together // recipe.data.context)
    rows = windows * recipe.data.context
    parts = _teacher_alone(windows, models, machine)
    parts["logits"] = float(3 * WIDE * rows * size.vocabulary)
    if machine.device == "cpu" and size.experts:
        parts["compiled products"] = float(COMPILED_BYTES)
    if recipe.train.evaluate_every is not None:
        tokens += recipe.data.heldout_tokens
    memory = Memory("scoring", parts)
    fix = "set train.shard: teacher, or let vLLM score (signals.vllm, signals.server)"
    return StageEstimate(
        "signals",
        memory,
        processes=machine.processes,
        tokens=tokens,
        flops=2.0 * size.active * tokens,
        disk=models.row_bytes * tokens,
        note=f"{compute} teacher, {rows:,} tokens at a time".replace("torch.", ""),
        fix=None if memory.fits(machine.memory) else fix,
    )


def _measured_teacher(models: RunModels, machine: Machine) -> StageEstimate:
    """Estimate measuring the teacher alone, once for all members of a family."""
    recipe = models.recipe
    teacher, heldout = config_size(models.teacher), recipe.data.heldout_tokens
    windows = max(1, TOKENS_PER_FORWARD // recipe.data.context)
    parts = _teacher_alone(windows, models, machine)
    parts["heads and logits"] = _heads_and_logits(teacher, None, models, machine)
    memory = Memory("fidelity", parts)
    return StageEstimate(
        "teacher",
        memory,
        processes=machine.processes,
        tokens=heldout,
        flops=2.0 * heldout * teacher.active,
        disk=float(heldout * teacher.hidden * machine.compute(recipe.train.precision).itemsize),
        fix=None if memory.fits(machine.memory) else "set train.shard: both",
    )


def _heads_and_logits(
    teacher: ModelSize, student: ModelSize | None, models: RunModels, machine: Machine
) -> float:
    """Estimate the bytes of the LM heads and logits in a comparison with the teacher. student: None
    while the teacher itself is measured.

    Unless weights are float32, float32 copies of both heads are made. On a CPU, the teacher's head
    is copied first, because its model is deleted.
    """
    compute = machine.compute(models.recipe.train.precision).itemsize
    heads = teacher.head + (0 if student is None else student.head)
    copies = WIDE * heads if compute < WIDE else 0
    kept = compute * teacher.head if machine.device == "cpu" else 0
    logits = 4 * WIDE * ROWS_PER_CHUNK * teacher.vocabulary
    return float(copies + kept + logits)


def _evaluation(models: RunModels, machine: Machine) -> StageEstimate:
    """Estimate the evaluation: first the teacher alone, then each student alone; speed is measured
    on all models together if they fit.

    In a family, the teacher was measured earlier.
    """
    recipe = models.recipe
    compute = machine.compute(recipe.train.precision).itemsize
    context, heldout = recipe.data.context, recipe.data.heldout_tokens
    teacher, student = config_size(models.teacher), config_size(models.student)
    windows = max(1, TOKENS_PER_FORWARD // context)
    runs_teacher = not models.member
    heads = {"heads and logits": _heads_and_logits(teacher, student, models, machine)}
    measured = {"student's fidelity": _alone(models.student, windows, models, machine) | heads}
    if runs_teacher:
        own_head = {"heads and logits": _heads_and_logits(teacher, None, models, machine)}
        measured["fidelity"] = _teacher_alone(windows, models, machine) | own_head
    own = -(-heldout // machine.processes)  # the rows of both models stay on the host
    rows = {"hidden states": float(compute * own * (teacher.hidden + student.hidden))}
    phases, text = [Memory(phase, parts, host=rows) for phase, parts in measured.items()], ""
    if machine.device == "cpu":
        phases = [Memory(phase, parts | rows) for phase, parts in measured.items()]
        if runs_teacher:
            phases.append(_loading(teacher, _stored_bytes(models.teacher), compute))
        trained = getattr(torch, recipe.train.weights).itemsize
        loading = _loading(student, trained, compute)
        phases.append(replace(loading, parts={**loading.parts, **heads, **rows}))
    if recipe.evaluate.speed:
        sharded = run_shard(models, machine) in ("teacher", "both")  # its speed is not measured
        timed = models.timed_students * student.parameters
        timed += 0 if sharded else teacher.parameters
        together = {"weights": float(compute * timed)}
        together["context"] = phases[0].parts["context"]
        speed = Memory("speed", together, host=phases[0].host)
        if speed.fits(machine.memory):
            phases.append(speed)
        else:
            text = "speed of the smaller models only"
    memory = max(phases, key=lambda each: each.total)
    return StageEstimate(
        models.stage("evaluate"),
        memory,
        processes=machine.processes,
        tokens=heldout * (runs_teacher + models.measured_students),
        flops=2.0 * heldout * models.measured_active,
        note=text,
        fix=None if memory.fits(machine.memory) else "set train.shard: both",
    )


def _stored_bytes(config: Any) -> int:
    """The bytes per weight in a model's files."""
    dtype = str(getattr(config, "dtype", None) or torch.float32)
    return int(getattr(torch, dtype.removeprefix("torch.")).itemsize)


def _loading(size: ModelSize, stored: int, compute: int) -> Memory:
    """Estimate the memory of loading a model while the pages of its files are in memory. stored,
    compute: bytes per weight in the files and in products.

    If both are the same, the files' pages are the weights. Files contain each expert's matrices
    separately; transformers reads them all in the compute dtype and joins each layer's.
    """
    parts = {"weights": float(compute * size.parameters), "libraries": LIBRARIES_BYTES}
    if stored != compute:
        parts["checkpoint"] = float(stored * size.parameters)
    parts["experts before they are joined"] = float(compute * size.experts)
    return Memory("loading", {part: bytes_ for part, bytes_ in parts.items() if bytes_})


def _quantization(models: RunModels, machine: Machine) -> StageEstimate:
    size = config_size(models.student)
    parts = {
        "weights": 2.0 * WIDE * size.parameters,  # as trained, and on the grid
        "context": context_bytes(machine.device),
    }
    disk = WIDE * size.parameters
    return StageEstimate(models.stage("quantize"), Memory("", parts), disk=disk)


def _export(models: RunModels, machine: Machine) -> StageEstimate:
    """Estimate the export: first the teacher alone scores the replays' text, if it fits; then the
    student's weights are cast and written."""
    size, teacher = config_size(models.student), config_size(models.teacher)
    # The weights in float32, in the exported dtype, and as the file's bytes.
    saving = {"weights": 2.0 * WIDE * size.parameters, "libraries": LIBRARIES_BYTES}
    compute = machine.compute(models.recipe.train.precision).itemsize
    alone = {
        "weights": float(compute * teacher.parameters),
        "logits": float(WIDE * REPLAY_TOKENS * teacher.vocabulary),
        "context": context_bytes(machine.device),
    }
    phases = [Memory("saving", saving), Memory("teacher", alone)]
    if machine.device == "cpu":
        phases.append(_loading(teacher, _stored_bytes(models.teacher), compute))
        memory = max(phases, key=lambda each: each.total)
        if not memory.fits(machine.memory):
            memory = phases[0]
    else:
        logits = alone.pop("logits")
        fits = phases[1].fits(machine.memory)
        memory = Memory("teacher", alone if fits else {}, host={**saving, "logits": logits})
    width = 2 if models.recipe.export.dtype == "bfloat16" else WIDE
    disk = width * size.parameters * len(models.recipe.export.formats)
    return StageEstimate(models.stage("export"), memory, disk=disk)


def _teacher_alone(windows: int, models: RunModels, machine: Machine) -> dict[str, float]:
    """Estimate running the teacher alone, sharded if it is sharded in training."""
    parts = _alone(models.teacher, windows, models, machine)
    if run_shard(models, machine) in ("teacher", "both"):
        size = config_size(models.teacher)
        gathered = GATHERED_BLOCKS * size.layer + size.head
        width = machine.compute(models.recipe.train.precision).itemsize
        parts["weights"] /= sharing(models.recipe.train, machine)
        parts["gathered"] = float(width * gathered)
    return parts


def _alone(config: Any, windows: int, models: RunModels, machine: Machine) -> dict[str, float]:
    """Estimate running a model for inference only."""
    compute = machine.compute(models.recipe.train.precision)
    found = trace_activations(
        config,
        models.recipe.data.context,
        compute=compute,
        weights=compute,
        device=machine.device,
        inference=True,
    )
    return {
        "weights": float(compute.itemsize * config_size(config).parameters),
        "activations": float(windows * found.forward),
        "context": context_bytes(machine.device),
    }
