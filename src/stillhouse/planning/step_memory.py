"""The memory of one process in a training step: sums over sizes, in bytes.

The phases of a step need different things: the teacher's forward pass, the loss, the backward
pass, the optimizer. The largest of them counts; `Memory.parts` are those of that phase.

Weights and their gradients have `Step.weights` bytes, AdamW's moments are float32 or in 8 bits;
products are computed in `Step.compute`. Gradients are reduced in float32. Sharded weights are
gathered a block at a time, the next block while one is computed; embeddings and head stay gathered
during a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from stillhouse.number_format import size
from stillhouse.planning.activation_trace import ActivationSizes
from stillhouse.planning.loss_memory import LossSizes
from stillhouse.planning.model_size import ModelSize

Shard = Literal["none", "student", "teacher", "both"]
SHARDS: tuple[Shard, ...] = ("none", "teacher", "student", "both")
"""From the fastest to the one that takes the least memory."""

WIDE = 4
"""Bytes of float32."""
MOMENTS = 8.0
"""Bytes of AdamW's two moments of a parameter in float32."""
MOMENTS_8BIT = 2 + 2 * 4 / 256
"""The same in 8 bits, with a float32 scale for each block of 256."""
MOMENTUM = 4.0
"""Muon's momentum of a parameter in a matrix."""
GATHERED_BLOCKS = 2
"""A block that is computed, and the next one, which is gathered meanwhile."""
HEAP_GAPS = 0.2
"""On a CPU, gaps between blocks of the C library's heap, by the bytes of all that is in memory.
Where tensors of a step find room among those that stay is chance: `HeapLimit` returns the gaps once
memory has grown by a quarter, and measured ones were 0.11 to 0.31 (docs/experiments.md)."""
COMPILED_BYTES = 1024 * 258_376
"""On a CPU, of a mixture of experts: oneDNN keeps its last 1,024 products, which it compiles for
their shapes, and the tokens of an expert vary. Each is in a block of so many bytes."""
CONTEXT_BYTES = 1.5e9
"""CUDA's context, the workspaces of cuBLAS and the buffers of NCCL."""
LIBRARIES_BYTES = 0.6e9
"""Of a process on a CPU: Python, PyTorch and the other libraries."""
MARGIN = 0.1
"""How far a real peak may be from the sum: by the allocator, and by what libraries take."""

Parts = dict[str, float]


def moment_bytes(optimizer: str, size: ModelSize) -> float:
    """Bytes of the state of a `train.optimizer`, of a parameter on average."""
    if optimizer == "muon":
        share = size.ends / size.parameters  # embeddings and head, which are AdamW's
        return MOMENTUM + (MOMENTS - MOMENTUM) * share
    return MOMENTS_8BIT if optimizer == "adamw_8bit" else MOMENTS


def context_bytes(device: str) -> float:
    """What a process takes on its device before there is a model."""
    return CONTEXT_BYTES if device == "cuda" else LIBRARIES_BYTES


def described(parts: Mapping[str, float]) -> str:
    """The largest first; those below 1% of all are left out."""
    whole = sum(parts.values())
    shown = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size(part)}" for name, part in shown if part >= whole / 100)


@dataclass(frozen=True)
class Memory:
    """What a process needs in the phase that needs the most, in bytes.

    parts: by what it is for. host: what a process with a GPU has in the machine's memory instead.
    """

    phase: str
    parts: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return described(self.parts)

    def plus(self, part: str, size: float) -> Memory:
        return replace(self, parts={**self.parts, part: size})

    def fits(self, available: float) -> bool:
        """Whether it fits for sure: with the margin."""
        return self.total * (1 + MARGIN) <= available

    def cannot_fit(self, available: float) -> bool:
        """Whether it does not fit, even where the sum is too large by the margin."""
        return self.total * (1 - MARGIN) > available


@dataclass(frozen=True)
class TrainedModel:
    """A student. trained: parameters that are trained. replicated: activations of a micro-batch
    with its own weights under autocast; sharded: with gathered weights."""

    size: ModelSize
    trained: int
    replicated: ActivationSizes
    sharded: ActivationSizes


@dataclass(frozen=True)
class LiveTeacher:
    """A model that answers during training. activations: at the peak of its forward pass. kept:
    hidden rows of intermediate layers that terms of the objective compare. mapped: its weights are
    mapped from their files, and a layer is in memory only while it runs."""

    size: ModelSize
    activations: int
    kept: int = 0
    mapped: bool = False


@dataclass(frozen=True)
class Step:
    """An optimizer step of one process, as far as its memory depends on it.

    teachers: none where signals are stored. compute: bytes of a number in products. gathered: of
    a number of the student's weights, where they are sharded and gathered. accumulates:
    whether gradients of several micro-batches are added up. moments: bytes of the optimizer's state
    of a parameter. weights: bytes of a weight, and of its gradient. context: bytes that a process
    takes before there is a model. on_cpu: whether the allocator is the C library's, which leaves
    gaps, and products are oneDNN's. offload: the teachers' weights are in the machine's memory, and
    gathered on the device.
    """

    student: TrainedModel
    teachers: Sequence[LiveTeacher]
    loss: LossSizes
    compute: int
    gathered: int
    accumulates: bool
    moments: float = MOMENTS
    weights: int = WIDE
    context: float = CONTEXT_BYTES
    on_cpu: bool = False
    offload: bool = False


def training_memory(step: Step, shard: Shard, *, over: int, processes: int) -> Memory:
    """In the phase of a step that needs the most; arguments as for `training_phases`."""
    phases = training_phases(step, shard, over=over, processes=processes)
    return max(phases, key=lambda memory: memory.total)


def training_phases(step: Step, shard: Shard, *, over: int, processes: int) -> list[Memory]:
    """Each phase of a step. over: processes that share what is sharded, all of them or those of a
    node. processes: all."""
    student = over if shard in ("student", "both") else 1
    teacher = over if shard in ("teacher", "both") else 1
    host = {}
    if step.offload and teacher > 1:
        host["teacher"] = step.compute * _parameters(step.teachers) / teacher
    phases = []
    for name, parts in _phases(step, student, teacher, processes).items():
        if step.on_cpu:
            allocated = sum(parts.values()) - step.context
            parts["heap"] = HEAP_GAPS * allocated
        phases.append(
            Memory(name, {part: bytes_ for part, bytes_ in parts.items() if bytes_}, host)
        )
    return phases


def fitting_shard(step: Step, available: float, *, over: int, processes: int) -> Shard | None:
    """The fastest way to share the models that fits into `available` bytes a process, with the
    margin; None where none does. over, processes: as for `training_memory`."""
    for shard in SHARDS:
        if shard in ("teacher", "both") and not step.teachers:
            continue
        if shard != "none" and over == 1:
            continue
        if training_memory(step, shard, over=over, processes=processes).fits(available):
            return shard
    return None


def _phases(step: Step, student: int, teacher: int, processes: int) -> dict[str, Parts]:
    """What each phase of a step needs. student, teacher: processes that share each model."""
    shape, trained = step.student.size, step.student.trained
    # FSDP2 also keeps copies of bfloat16 weights alike, since DDP reduces in their type.
    wrapped = student > 1 or (processes > 1 and step.weights < WIDE)
    found = step.student.sharded if wrapped else step.student.replicated
    gradients = step.weights * trained / student
    gathered = step.gathered * GATHERED_BLOCKS * shape.layer if wrapped else 0
    ends = step.gathered * shape.ends if wrapped else 0
    offloaded = step.offload and teacher > 1
    base: Parts = {
        "student weights": step.weights * shape.parameters / student,
        "gradients": gradients if step.accumulates else 0,
        "moments": step.moments * trained / student,
        "DDP buckets": WIDE * trained if processes > 1 and not wrapped else 0,
        "teacher": 0 if offloaded else step.compute * _resident(step.teachers, teacher),
        "compiled products": _compiled(step),
        "context": step.context,
    }
    apart = teacher > 1
    heads = step.compute * sum(each.size.ends for each in step.teachers) if apart else 0
    layers = max((each.size.layer for each in step.teachers), default=0) if apart else 0
    kept = sum(each.kept for each in step.teachers)
    tied = step.loss.head_gradient if shape.tied else 0
    phases = {
        "teacher": {
            **base,
            "gathered teacher": heads + step.compute * GATHERED_BLOCKS * layers,
            "activations": max((each.activations for each in step.teachers), default=0) + kept,
        },
        "forward": {
            **base,
            "gathered teacher": heads,
            "gathered student": ends + gathered,
            "copies of weights": found.casts,
            "activations": found.forward + kept,
        },
        "loss": {
            **base,
            "gathered teacher": heads,
            "gathered student": ends,
            "copies of weights": found.casts,
            "activations": found.kept + kept,
            "loss": step.loss.rows + step.loss.tiles + step.loss.head_gradient,
        },
        "backward": {
            **base,
            "gathered teacher": heads,
            "gathered student": ends + gathered,
            "activations": found.backward,
            "copies of weights": found.backward_casts,
            "gradients": gradients,
            "loss": tied,
            "reduce buffers": WIDE * GATHERED_BLOCKS * shape.layer if wrapped else 0,
        },
        "optimizer": {
            **base,
            "gradients": gradients,
            "gathered teacher": heads,
            "gathered student": 2 * ends,  # and their gradients, before they are reduced
            "reduce buffers": WIDE * shape.ends if wrapped else 0,
        },
    }
    if not wrapped and not step.accumulates:
        # Gradients are made while activations go, and never all of both are there.
        backward = found.with_gradients + step.loss.head_gradient
        phases["backward"]["activations"] = max(0, backward - gradients)
    return phases


def _compiled(step: Step) -> int:
    models = (step.student.size, *(each.size for each in step.teachers))
    return COMPILED_BYTES if step.on_cpu and any(size.experts for size in models) else 0


def _parameters(teachers: Sequence[LiveTeacher]) -> int:
    return sum(each.size.parameters for each in teachers)


def _resident(teachers: Sequence[LiveTeacher], shared_by: int) -> float:
    """Parameters of the teachers that are in a process's memory all the time, and of one layer."""
    return sum(
        each.size.ends + each.size.layer
        if each.mapped and shared_by == 1
        else each.size.parameters / shared_by
        for each in teachers
    )
