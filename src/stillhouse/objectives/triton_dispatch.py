"""Whether the Triton kernel can compute a block, and with which arguments."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.objectives.groups import Group, Member
from stillhouse.objectives.products import ComputeHead
from stillhouse.objectives.terms import Term

KINDS = (
    "forward_kl",
    "reverse_kl",
    "total_variation",
    "jsd",
    "normalized_jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
)
"""Divergences that the kernel computes; each has at most one parameter."""


@dataclass(frozen=True)
class RowKernel:
    """One divergence, with or without cross-entropy: one launch per block, and no scratch."""

    divergence: Member
    data: Member | None
    student_scale: float
    teacher_scale: float

    def run(
        self,
        student_bV: Tensor,
        teacher_bV: Tensor,
        targets_b: Tensor | None,
        losses_Mb: Tensor,
        *,
        grad: bool,
    ) -> None:
        """As `Blocks.run`."""
        from stillhouse.objectives import triton_kernel

        kind, parameter, divisor = reduced(self.divergence.term)
        values_b, cross_b = triton_kernel.run(
            student_bV,
            teacher_bV,
            None if self.data is None else targets_b,
            kind,
            parameter,
            student_scale=self.student_scale,
            teacher_scale=self.teacher_scale,
            coefficient=self.divergence.coefficient,
            of_data=0.0 if self.data is None else self.data.coefficient,
            grad=grad,
        )
        term = self.divergence.term
        losses_Mb[self.divergence.place] = values_b * (term.factor / divisor)
        if self.data is not None:
            losses_Mb[self.data.place] = cross_b * self.data.term.factor


def runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def row_kernel(
    groups: Sequence[Group],
    student: ComputeHead,
    teacher: ComputeHead | None,
    reduce_dtype: torch.dtype,
) -> RowKernel | None:
    """The kernel for these terms; None if only PyTorch's operators can compute them: in float64,
    with a bias or a soft-cap, for several divergences or temperatures, and for adaptive_kl (it
    sorts) and alpha_beta."""
    heads = [head for head in (student, teacher) if head is not None]
    plain = all(head.bias_V is None and head.softcap is None for head in heads)
    if len(groups) != 1 or reduce_dtype != torch.float32 or not plain:
        return None
    group = groups[0]
    if len(group.of_teacher) != 1 or len(group.of_data) > 1:
        return None
    divergence = group.of_teacher[0]
    if divergence.term.divergence not in KINDS:
        return None
    teacher_scale = 1.0 if teacher is None else teacher.scale
    return RowKernel(
        divergence,
        group.of_data[0] if group.of_data else None,
        student.scale / group.temperature,
        teacher_scale / group.temperature,
    )


def reduced(term: Term) -> tuple[str, float, float]:
    """The kernel's kind and parameter, and the divisor of its value.

    At its limits a parametrized divergence is a simpler one: see `divergences`.
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
