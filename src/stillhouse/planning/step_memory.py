"""Estimates the memory of one process in a training step, in bytes.

A step has phases with different needs: the teacher's forward pass, the student's, the loss, the
backward pass, and the optimizer. The largest phase counts, and `Memory.parts` belong to that phase.

Weights and their gradients have `Step.weights` bytes each, AdamW's moments are in float32 or 8
bits, products are computed in `Step.compute`, and gradients are reduced in float32. Sharded weights
are gathered block by block, the next block while the current one is computed; embeddings and the LM
head stay gathered during a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from stillhouse.number_format import size
from stillhouse.planning.activation_trace import ActivationSizes
from stillhouse.planning.loss_memory import LossSizes
from stillhouse.planning.model_size import ModelSize

Shard = Literal["none", "student", "teacher", "both"]
SHARDS: tuple[Shard, ...] = ("none", "teacher", "student", "both")
"""Ordered from the fastest to the one that uses the least memory."""

WIDE = 4
"""Bytes of a float32 number."""
MOMENTS = 8.0
"""Bytes per parameter of AdamW's two moments in float32."""
MOMENTS_8BIT = 2 + 2 * 4 / 256
"""Bytes per parameter of AdamW's two moments in 8 bits, with a float32 scale per block of 256."""
MOMENTUM = 4.0
"""Bytes per matrix parameter of Muon's momentum."""
GATHERED_BLOCKS = 2
"""The block that is being computed, and the next one, which is gathered in the meantime."""
HEAP_GAPS = 0.2
"""On a CPU, the gaps between blocks on the C library's heap, as a fraction of all allocated bytes.
Where a step's tensors find room among those that stay is a matter of chance. `HeapLimit` returns
the gaps once memory has grown by a quarter, and measured gaps were 0.11 to 0.31
(docs/experiments.md)."""
COMPILED_BYTES = 1024 * 258_376
"""On a CPU, for a mixture of experts: oneDNN caches the last 1,024 products that it compiled for
specific shapes, and the number of tokens per expert varies. Each takes a block of this many
bytes."""
CONTEXT_BYTES = 1.5e9
"""Bytes of the CUDA context, cuBLAS workspaces, and NCCL buffers."""
LIBRARIES_BYTES = 0.6e9
"""Bytes of a CPU process for Python, PyTorch, and other libraries."""
MARGIN = 0.1
"""How far a real peak can be from the sum, because of the allocator and of libraries."""

Parts = dict[str, float]


def moment_bytes(optimizer: str, size: ModelSize) -> float:
    """Return the mean bytes per parameter of the optimizer's state. optimizer: as in
    `train.optimizer`."""
    if optimizer == "muon":
        share = size.ends / size.parameters  # AdamW trains the embeddings and the LM head
        return MOMENTUM + (MOMENTS - MOMENTUM) * share
    return MOMENTS_8BIT if optimizer == "adamw_8bit" else MOMENTS


def context_bytes(device: str) -> float:
    """Return the bytes that a process uses on its device before it loads a model."""
    return CONTEXT_BYTES if device == "cuda" else LIBRARIES_BYTES


def described(parts: Mapping[str, float]) -> str:
    """Describe the parts, largest first, leaving out those below 1% of the total."""
    whole = sum(parts.values())
    shown = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size(part)}" for name, part in shown if part >= whole / 100)


@dataclass(frozen=True)
class Memory:
    """The bytes that a process needs in one phase.

    parts: bytes by purpose. host: what a GPU's process keeps in host memory instead.
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
        """Whether it certainly fits, even if the sum is too small by the margin."""
        return self.total * (1 + MARGIN) <= available

    def cannot_fit(self, available: float) -> bool:
        """Whether it certainly does not fit, even if the sum is too large by the margin."""
        return self.total * (1 - MARGIN) > available


@dataclass(frozen=True)
class TrainedModel:
    """A student. trained: the number of trained parameters. activations: what a micro-batch needs,
    either with local weights under autocast (False), or with gathered weights (True). It is traced
    when it is first asked for, which takes seconds. Raises ModelError like `trace_activations`."""

    size: ModelSize
    trained: int
    activations: Callable[[bool], ActivationSizes]


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that scores text during training.

    activations: bytes at the peak of its forward pass. kept: bytes of the intermediate hidden
    states that the objective's terms compare. mapped: whether its weights are memory-mapped from
    their files, so that a layer is in memory only while it runs.
    """

    size: ModelSize
    activations: int
    kept: int = 0
    mapped: bool = False


@dataclass(frozen=True)
class Step:
    """Everything about one process's optimizer step that its memory depends on.

    teachers: the live teachers; empty if signals are cached. compute: bytes per number in products.
    gathered: bytes per gathered weight of a sharded student. accumulates: whether the gradients of
    several micro-batches are accumulated. moments: bytes of optimizer state per parameter. weights:
    bytes per weight, and per element of its gradient. context: bytes that a process uses before it
    loads a model. on_cpu: whether the C library allocates, which leaves gaps, and oneDNN computes
    the products. offload: whether the teachers' weights are in host memory and gathered on the
    device.
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

    @property
    def teacher_parameters(self) -> int:
        return sum(each.size.parameters for each in self.teachers)


def training_memory(step: Step, shard: Shard, *, over: int, processes: int) -> Memory:
    """Return the memory of the step's largest phase. Arguments: as for `training_phases`."""
    phases = training_phases(step, shard, over=over, processes=processes)
    return max(phases, key=lambda memory: memory.total)


def training_phases(step: Step, shard: Shard, *, over: int, processes: int) -> list[Memory]:
    """Return the memory of each phase of a step. over: the number of processes that a model is
    sharded over: all of them, or those of a node. processes: the number of all processes."""
    student = over if shard in ("student", "both") else 1
    teacher = over if shard in ("teacher", "both") else 1
    host = {}
    if step.offload and teacher > 1:
        host["teacher"] = step.compute * step.teacher_parameters / teacher
    phases = []
    for name, parts in _phases(step, student, teacher, processes).items():
        if step.on_cpu:
            parts["heap"] = HEAP_GAPS * (sum(parts.values()) - step.context)
        needed = {part: bytes_ for part, bytes_ in parts.items() if bytes_}
        phases.append(Memory(name, needed, host))
    return phases


def fitting_shard(
    step: Step, available: float, *, over: int, processes: int, student: bool = True
) -> Shard | None:
    """Return the fastest sharding that fits into `available` bytes per process, with the margin;
    None if none fits. over, processes: as for `training_memory`. student: whether the student can
    be sharded."""
    for shard in SHARDS:
        if shard in ("student", "both") and not student:
            continue
        if shard in ("teacher", "both") and not step.teachers:
            continue
        if shard != "none" and over == 1:
            continue
        if training_memory(step, shard, over=over, processes=processes).fits(available):
            return shard
    return None


def _phases(step: Step, student: int, teacher: int, processes: int) -> dict[str, Parts]:
    """Return what each phase of a step needs. student, teacher: the number of processes that each
    model is sharded over."""
    shape, trained = step.student.size, step.student.trained
    # FSDP2 also replicates bfloat16 weights, because DDP would reduce their gradients in bfloat16.
    wrapped = student > 1 or (processes > 1 and step.weights < WIDE)
    found = step.student.activations(wrapped)
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
            "gathered student": 2 * ends,  # including their gradients before they are reduced
            "reduce buffers": WIDE * shape.ends if wrapped else 0,
        },
    }
    if not wrapped and not step.accumulates:
        # Activations are freed as gradients are computed, so the two are never complete together.
        backward = found.with_gradients + step.loss.head_gradient
        phases["backward"]["activations"] = max(0, backward - gradients)
    return phases


def _compiled(step: Step) -> int:
    models = (step.student.size, *(each.size for each in step.teachers))
    return COMPILED_BYTES if step.on_cpu and any(size.experts for size in models) else 0


def _resident(teachers: Sequence[LiveTeacher], shared_by: int) -> float:
    """Return the number of teacher parameters in a process's memory. Of a memory-mapped teacher,
    only the embeddings, the LM head, and one layer count."""
    return sum(
        each.size.ends + each.size.layer
        if each.mapped and shared_by == 1
        else each.size.parameters / shared_by
        for each in teachers
    )
