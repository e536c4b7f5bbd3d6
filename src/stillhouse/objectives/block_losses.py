"""Losses and ∂loss/∂logits of one block of rows, whatever the signal.

Shapes: b rows of a block, K entries of a row, M terms, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.objectives.dense import (
    Counted,
    Projected,
    any_divergence,
    forward_kl_and_counted,
)
from stillhouse.objectives.groups import Group, Workspace
from stillhouse.objectives.head_logits import ComputeHead
from stillhouse.objectives.sparse import bucketed
from stillhouse.objectives.triton_dispatch import row_kernel
from stillhouse.signals import SampledSignal, SparseSignal


@dataclass(frozen=True)
class ProjectedRows:
    """A block of a frozen-head signal. score_b: Wᵀp · h, before any temperature."""

    score_b: Tensor
    negative_entropy_b: Tensor


Teacher = Tensor | SparseSignal | SampledSignal | ProjectedRows | None
"""What one block is compared with: raw logits [b, V], or a block of a stored signal."""


class Blocks:
    """Works on one block of rows after another, in scratch that is allocated once."""

    def __init__(
        self,
        groups: Sequence[Group],
        student: ComputeHead,
        teacher: ComputeHead | None,
        space: Workspace,
    ) -> None:
        self.groups = groups
        self.student = student
        self.teacher = teacher
        self.space = space
        like = space.like
        self.kernel = row_kernel(groups, student, teacher, like.device, like.dtype)

    def run(
        self,
        student_bV: Tensor,
        teacher: Teacher,
        targets_b: Tensor | None,
        losses_Mb: Tensor,
        *,
        grad: bool,
    ) -> None:
        """Fills the losses; with `grad`, writes ∂loss/∂(raw logits) over `student_bV`.

        Logits come in as raw products of hidden rows and head, and are overwritten.
        """
        if self.kernel is not None and isinstance(teacher, Tensor):
            self.kernel.run(student_bV, teacher, targets_b, losses_Mb, grad=grad)
            return
        out_bV = student_bV
        zs_bV = self.space.wide("student", student_bV)
        self.student.finish_(zs_bV)
        if isinstance(teacher, Tensor):
            teacher = self.space.wide("teacher", teacher)
            if self.teacher is not None:
                self.teacher.finish_(teacher)
        slope_bV = self._cap_slope(zs_bV) if grad else None
        simple = len(self.groups) == 1 and slope_bV is None
        total_bV = self.space.buffer("total", len(out_bV)) if grad and not simple else None
        for place, group in enumerate(self.groups):
            last = place == len(self.groups) - 1
            zs_group_bV = self._at_temperature("zs", zs_bV, group, last)
            part_bV = out_bV if simple else zs_group_bV
            self._run_group(
                group, zs_group_bV, teacher, targets_b, losses_Mb, part_bV if grad else None, last
            )
            if total_bV is not None:
                total_bV.copy_(part_bV) if place == 0 else total_bV.add_(part_bV)
        if total_bV is not None:
            out_bV.copy_(total_bV if slope_bV is None else total_bV.mul_(slope_bV))

    def _run_group(
        self,
        group: Group,
        zs_bV: Tensor,
        teacher: Teacher,
        targets_b: Tensor | None,
        losses_Mb: Tensor,
        out_bV: Tensor | None,
        last: bool,
    ) -> None:
        counted: list[Counted] = []
        if group.of_data and targets_b is not None:
            ones_b1 = zs_bV.new_ones(len(zs_bV), 1)
            counted.append(Counted(group.of_data, targets_b[:, None], ones_b1))
        if not group.of_teacher:
            teacher = None
        if isinstance(teacher, SparseSignal):
            bucketed(group, zs_bV, teacher, counted, losses_Mb, out_bV)
            return
        if isinstance(teacher, ProjectedRows):
            score_b = teacher.score_b / group.temperature
            projected = Projected(group.of_teacher, score_b, teacher.negative_entropy_b)
            targets: list[Counted | Projected] = [*counted, projected]
            forward_kl_and_counted(group, zs_bV, None, targets, losses_Mb, out_bV, self.space)
            return
        if isinstance(teacher, SampledSignal):
            shares_bK = teacher.counts_NK.to(zs_bV.dtype)
            shares_bK = shares_bK / shares_bK.sum(1, keepdim=True)
            counted.append(Counted(group.of_teacher, teacher.ids_NK, shares_bK))
            teacher = None
        zt_bV = None if teacher is None else self._at_temperature("zt", teacher, group, last)
        if zt_bV is None or group.only("forward_kl"):
            forward_kl_and_counted(group, zs_bV, zt_bV, counted, losses_Mb, out_bV, self.space)
        else:
            any_divergence(group, zs_bV, zt_bV, counted, losses_Mb, out_bV, self.space)

    def _cap_slope(self, logits_bV: Tensor) -> Tensor | None:
        """dz/du of z = c·tanh(u / c), from z; None where there is no cap."""
        cap = self.student.softcap
        if cap is None:
            return None
        slope_bV = torch.div(logits_bV, cap, out=self.space.buffer("slope", len(logits_bV)))
        return slope_bV.square_().neg_().add_(1.0)

    def _at_temperature(self, name: str, z_bV: Tensor, group: Group, last: bool) -> Tensor:
        """z / T: in place for the last group, else in a buffer, since others still need z."""
        if last:
            return z_bV if group.temperature == 1.0 else z_bV.div_(group.temperature)
        return torch.div(z_bV, group.temperature, out=self.space.buffer(name, len(z_bV)))
