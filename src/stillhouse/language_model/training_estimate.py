"""Estimates a run's time, memory and disk space, and what a signal store would save."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import torch

from stillhouse import account
from stillhouse.finding import Finding
from stillhouse.hardware import choose_precision, default_device, matmul_rate
from stillhouse.language_model.data_check import TOKENS
from stillhouse.language_model.job import Job, configs, planned_objective, planned_size
from stillhouse.language_model.recipe import Recipe
from stillhouse.launch import world_size
from stillhouse.pipeline.kind import Check
from stillhouse.signals.manifest import read_manifest
from stillhouse.signals.signals_config import FrozenHeadSignals, HiddenSignals, SignalsRecipe
from stillhouse.training.objective import stored_layers
from stillhouse.training.train import plan_batches

EFFICIENCY = 0.55
"""Share of the measured matrix product rate that a training step reaches (bench/step)."""
SEGMENT_BYTES = 2.0
"""Bytes of keys, offsets and checksums per token in a store, for documents of a few hundred
tokens."""
ADAM_BYTES = 16
"""Bytes per parameter: float32 weight, gradient and two moments."""


def check_training(check: Check) -> Iterator[Finding]:
    """The student's size, and the cost of its training on this machine.

    Raises StillhouseError as planning the objective does.
    """
    if TOKENS not in check.found:
        return
    job: Job = check.job
    recipe, tokens = job.recipe, int(check.found[TOKENS])
    section = recipe.train
    student_config, teacher_config = configs(job)
    teacher, student = planned_size(teacher_config), planned_size(student_config)
    yield Finding(
        "estimate",
        "student",
        f"{student.total / 1e6:,.1f}M parameters ({student.total / teacher.total:.0%} of the "
        f"teacher's {teacher.total / 1e6:,.1f}M), {student.non_embedding / 1e6:,.1f}M without "
        "embeddings",
    )
    tokens -= 0 if recipe.data.heldout_sources else recipe.data.heldout_tokens
    tokens = max(1, min(tokens, recipe.data.train_tokens or tokens))
    windows = max(1, -(-tokens // recipe.data.context))
    plan = plan_batches(section, windows, world_size())
    steps_tokens = plan.steps * section.batch_size * recipe.data.context
    live = teacher.head_once if recipe.signals is None else 0
    flops = account.distillation_flops(student.head_once, live, steps_tokens)
    device = default_device()
    precision = choose_precision(section.precision, device)
    rate = EFFICIENCY * matmul_rate(precision.dtype, device)
    asking = account.forward_flops(teacher.head_once, tokens) / rate
    yield from _signals(job, tokens, steps_tokens / tokens, asking, teacher, student)
    yield Finding(
        "estimate",
        "training",
        f"{plan.steps:,} steps of {section.batch_size} x {recipe.data.context} tokens: "
        f"{steps_tokens:,} tokens, {flops / 1e12:,.0f} TFLOP, about "
        f"{_duration(flops / rate)} at {rate / 1e9:,.0f} GFLOP/s ({precision.reason})",
    )
    need = _training_memory(student, teacher, student_config, plan.micro, recipe, precision.dtype)
    yield _memory(need, device)


def _signals(
    job: Job,
    tokens: int,
    passes: float,
    asking: float,
    teacher: account.ParameterCount,
    student: account.ParameterCount,
) -> Iterator[Finding]:
    """What a store costs and saves. passes: times each token is trained on; asking: seconds for
    the teacher to score every token once."""
    section = job.recipe.signals
    if section is not None and section.store is not None:
        manifest = read_manifest(job.base / section.store)
        kind = manifest.settings.encoding.kind
        text = f"{section.store}: {manifest.rows:,} tokens of kind {kind}, recorded before"
        yield Finding("ok", "signals", text)
        return
    if section is not None and section.answers is not None:
        yield Finding(
            "ok", "signals", "the log-probabilities that the API returns with its answers"
        )
        return
    size = f"{tokens * row_bytes(job, section or SignalsRecipe()) / 1e6:,.0f} MB"
    faster = f"{1 + teacher.head_once / (3 * student.head_once):.1f} times as fast"
    if section is not None:
        text = f"the teacher reads the text once (about {_duration(asking)}); {size} are stored"
        if passes < 2:
            text += f"; it pays from a second student or epoch on, which then trains {faster}"
        else:
            text += f"; {passes:.0f} epochs save about {_duration((passes - 1) * asking)}"
        yield Finding("estimate", "signals", text)
    elif passes >= 2:
        text = f"the teacher reads the same text {passes:.0f} times"
        saved = _duration((passes - 1) * asking)
        fix = f"add `signals: {{}}`: one reading is stored, which saves about {saved} for {size}"
        yield Finding("estimate", "signals", text, fix)
    else:
        text = (
            f"the teacher answers live; with `signals: {{}}` ({size}) a second student or epoch "
            f"trains {faster}"
        )
        yield Finding("estimate", "signals", text)


def row_bytes(job: Job, section: SignalsRecipe) -> float:
    """Approximate bytes of a stored token."""
    match section.encoding:
        case FrozenHeadSignals():
            row = 4.0 + 2 * configs(job)[0].get_text_config().hidden_size
        case HiddenSignals():
            teacher = configs(job)[1].get_text_config()
            layers = stored_layers(planned_objective(job), teacher)
            row = 2.0 * teacher.hidden_size * len(layers)
        case entries:
            row = entries.row_bytes
    return row + SEGMENT_BYTES


def _training_memory(
    student: account.ParameterCount,
    teacher: account.ParameterCount,
    config: Any,
    micro: int,
    recipe: Recipe,
    dtype: torch.dtype,
) -> int:
    """Peak bytes of a step. Activations by the usual count of tensors stored per layer."""
    text = config.get_text_config()
    tokens = micro * recipe.data.context
    wide = getattr(text, "intermediate_size", 4 * text.hidden_size)  # GPT-2 has no such key
    kept_a_layer = 12 * text.hidden_size + 4 * wide
    layers = 1 if recipe.train.gradient_checkpointing else text.num_hidden_layers
    activations = tokens * layers * kept_a_layer * 4
    low = dtype.itemsize if dtype != torch.float32 else 0
    weights = student.total * (ADAM_BYTES + low) + teacher.total * dtype.itemsize
    head = text.vocab_size * text.hidden_size * 4
    return weights + activations + head


def _memory(need: int, device: torch.device) -> Finding:
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = psutil.virtual_memory().available
    text = f"about {need / 1e9:.1f} GB for training; {available / 1e9:.1f} GB are free on {device}"
    if need > available:
        fix = "lower train.micro_batch_size, or set train.gradient_checkpointing: true"
        return Finding("error", "memory", text, fix)
    return Finding("estimate", "memory", text)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
