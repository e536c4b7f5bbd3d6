"""Dispatch of blocks to Triton kernels: when a kernel can be used, and with which arguments."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.objectives.dense import IMPOSSIBLE, ProjectedRows, Teacher
from stillhouse.objectives.groups import Group, Member
from stillhouse.objectives.products import ComputeHead
from stillhouse.objectives.terms import Term
from stillhouse.signals import SampledSignal, Signal, SparseSignal

KINDS = (
    "forward_kl",
    "reverse_kl",
    "total_variation",
    "jsd",
    "normalized_jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
)
"""Divergences that the kernels compute; each has at most one parameter."""
MOST_ENTRIES = 1024
"""The most tokens of a stored row that a kernel's program can keep in registers."""


@dataclass(frozen=True)
class RowKernels:
    """At most one divergence plus cross-entropy, in one launch per block, without scratch.

    divergence, data: the two terms; one can be missing.
    scale, data_scale: factors of the student's logits for these two terms.
    teacher_scale: factor of the teacher's logits.
    teacher_floor: lower bound of the teacher's logits before they are scaled.
    """

    divergence: Member | None
    data: Member | None
    scale: float
    data_scale: float
    teacher_scale: float
    teacher_floor: float

    def run(
        self,
        student_bV: Tensor,
        teacher: Teacher,
        targets_b: Tensor | None,
        losses_Mb: Tensor,
        *,
        grad: bool,
    ) -> None:
        """See `Blocks.run`."""
        from stillhouse.objectives import triton_entries, triton_kernel

        kind, parameter, divisor = "forward_kl", 0.0, 1.0
        if self.divergence is None:
            teacher = None
        else:
            kind, parameter, divisor = reduced(self.divergence.term)
        common = triton_kernel.arguments(
            student_bV,
            None if self.data is None else targets_b,
            grad=grad,
            student_scale=self.scale,
            data_scale=self.data_scale,
            coefficient=0.0 if self.divergence is None else self.divergence.coefficient,
            of_data=0.0 if self.data is None else self.data.coefficient,
        )
        values_b = common["values"]
        if isinstance(teacher, Tensor):
            scale, floor = self.teacher_scale, self.teacher_floor
            triton_kernel.dense_rows(
                common, teacher, kind, parameter, teacher_scale=scale, teacher_floor=floor
            )
        elif isinstance(teacher, SparseSignal):
            triton_entries.sparse_rows(common, teacher, kind, parameter)
        else:
            counted = teacher if isinstance(teacher, SampledSignal) else None
            triton_entries.counted_rows(common, counted)
            if isinstance(teacher, ProjectedRows) and self.divergence is not None:
                score_b = teacher.score_b / self.divergence.term.temperature
                values_b = teacher.negative_entropy_b + values_b - score_b
        if self.divergence is not None:
            factor = self.divergence.term.factor / divisor
            losses_Mb[self.divergence.place] = values_b * factor
        if self.data is not None:
            losses_Mb[self.data.place] = common["cross"] * self.data.term.factor


def runs_as_kernels(divergences: Iterable[str]) -> bool:
    """Whether the kernels support a mixture of these terms; see `row_kernels` for other limits."""
    of_teacher = set(divergences) - {"cross_entropy"}
    return len(of_teacher) <= 1 and of_teacher <= set(KINDS)


def runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def row_kernels(
    groups: Sequence[Group],
    student: ComputeHead,
    teacher: ComputeHead | None,
    signal: Signal | None,
    reduce_dtype: torch.dtype,
) -> RowKernels | None:
    """The kernels for these terms, or None if only PyTorch's operators can compute them.

    Kernels do not support float64, a head with a bias or a soft cap, several divergences,
    adaptive_kl (which sorts), alpha_beta, or stored rows that have more than MOST_ENTRIES tokens or
    the whole vocabulary.

    teacher: the head of a dense signal.
    """
    heads = [head for head in (student, teacher) if head is not None]
    plain = all(head.bias_V is None and head.softcap is None for head in heads)
    divergences = [member for group in groups for member in group.of_teacher]
    data = [member for group in groups for member in group.of_data]
    names = [member.term.divergence for member in divergences]
    several = len(divergences) > 1 or len(data) > 1
    if reduce_dtype != torch.float32 or not plain or several or not runs_as_kernels(names):
        return None
    temperature = divergences[0].term.temperature if divergences else 1.0
    if isinstance(signal, SparseSignal | SampledSignal):
        most = MOST_ENTRIES
        if isinstance(signal, SparseSignal):  # at least one token must be in the tail
            most = min(most, len(student.weight_VD) - 1)
        if signal.ids_NK.shape[1] > most:
            return None
    teacher_scale = 1.0 if teacher is None else teacher.scale
    return RowKernels(
        divergences[0] if divergences else None,
        data[0] if data else None,
        student.scale / temperature,
        student.scale,
        teacher_scale / temperature,
        IMPOSSIBLE if teacher is None else -torch.inf,
    )


def reduced(term: Term) -> tuple[str, float, float]:
    """The kernel's kind, its parameter, and the divisor of its value.

    At its limits, a parametrized divergence reduces to a simpler one; see `divergences`.
    """
    parameter = next(iter(term.parameters.values()), 0.0)
    match term.divergence:
        case "normalized_jsd" if parameter == 0.0:
            return "forward_kl", 0.0, 1.0
        case "normalized_jsd" if parameter == 1.0:
            return "reverse_kl", 0.0, 1.0
        case "normalized_jsd":
            return "jsd", parameter, parameter * (1.0 - parameter)
        case "skew_forward_kl" if parameter == 0.0:
            return "forward_kl", 0.0, 1.0
        case "skew_reverse_kl" if parameter == 0.0:
            return "reverse_kl", 0.0, 1.0
    return term.divergence, parameter, 1.0
