"""Builds the description of a training step's memory from its models' configurations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch

from stillhouse.objectives.triton_dispatch import runs_as_kernels
from stillhouse.planning.activation_trace import ActivationSizes, trace_activations
from stillhouse.planning.loss_memory import loss_sizes
from stillhouse.planning.model_size import config_size
from stillhouse.planning.step_memory import (
    LiveTeacher,
    Step,
    TrainedModel,
    context_bytes,
    moment_bytes,
)


def training_step(
    student: Any,
    teachers: Sequence[Any],
    *,
    windows: int,
    context: int,
    accumulates: bool,
    compute: torch.dtype,
    weights: torch.dtype = torch.float32,
    gathered: torch.dtype | None = None,
    device: Literal["cpu", "cuda"],
    checkpointing: bool = False,
    freeze_head: bool = False,
    optimizer: str = "adamw",
    offload: bool = False,
    divergences: Sequence[str] = ("forward_kl",),
    kept_layers: int = 0,
) -> Step:
    """Describe one process's step on micro-batches of `windows` windows of `context` tokens.

    student, teachers: the configurations of the student and the live teachers. weights: the dtype
    of the student's weights. gathered: the dtype in which a sharded student's weights are gathered;
    None means the products' dtype. optimizer: as in `train.optimizer`. kept_layers: how many of
    the teacher's layers the objective's terms compare. Neither reads nor allocates weights.
    Raises ModelError like `planned_model` and `trace_activations`.
    """
    trace = partial(trace_activations, context=context, compute=compute, device=device)
    size = config_size(student)

    def activations(sharded: bool) -> ActivationSizes:
        own = (gathered or compute) if sharded else weights
        found = trace(student, weights=own, checkpointing=checkpointing, keep_casts=not sharded)
        return found.times(windows)

    live = []
    for config in teachers:
        found = trace(config, weights=compute, inference=True)
        its = config_size(config)
        kept = kept_layers * windows * context * its.hidden * compute.itemsize
        mapped = device == "cpu" and getattr(config, "dtype", None) == compute
        live.append(LiveTeacher(its, windows * found.forward, kept, mapped))
    loss = loss_sizes(
        windows * context,
        size.vocabulary,
        size.hidden,
        tuple(each.size.hidden for each in live),
        compute=compute,
        device=device,
        kernels=device == "cuda" and runs_as_kernels(divergences),
        only_kl=set(divergences) <= {"forward_kl", "cross_entropy"},
        trained_head=not freeze_head,
        copies_head=weights != compute,
    )
    frozen = size.head if freeze_head else 0
    return Step(
        student=TrainedModel(size, size.parameters - frozen, activations),
        teachers=tuple(live),
        loss=loss,
        compute=compute.itemsize,
        gathered=(gathered or compute).itemsize,
        accumulates=accumulates,
        moments=moment_bytes(optimizer, size),
        weights=weights.itemsize,
        context=context_bytes(device),
        on_cpu=device == "cpu",
        offload=offload,
    )
