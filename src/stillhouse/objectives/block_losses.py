"""Losses and ∂loss/∂logits of one block of rows, for every kind of signal.

Shapes: b rows of a block, K entries of a row, M terms, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.objectives.dense import (
    Counted,
    GroupBlock,
    Projected,
    ProjectedRows,
    Teacher,
    any_divergence,
    forward_kl_and_counted,
    sampled,
)
from stillhouse.objectives.folded import Folding
from stillhouse.objectives.groups import Group, Workspace
from stillhouse.objectives.products import ComputeHead
from stillhouse.objectives.sparse import bucketed
from stillhouse.objectives.triton_dispatch import RowKernels
from stillhouse.signals import SampledSignal, SparseSignal


@dataclass
class Blocks:
    """Computes one block of rows after another, reusing scratch that is allocated once.

    kernels: if given, they compute every block instead of PyTorch's operators.
    folding: for a teacher with a different vocabulary.
    """

    groups: Sequence[Group]
    student: ComputeHead
    teacher: ComputeHead | None
    space: Workspace
    kernels: RowKernels | None
    folding: Folding | None = None

    def __post_init__(self) -> None:
        self.teacher_space = self.space if self.folding is None else self.folding.teacher_space

    def run(
        self,
        student_bV: Tensor,
        teacher: Teacher,
        targets_b: Tensor | None,
        losses_Mb: Tensor,
        *,
        covered_b: Tensor | None = None,
        grad: bool,
    ) -> None:
        """Fill the losses; with `grad`, write ∂loss/∂(raw logits) over `student_bV`.

        Logits are the raw products of hidden rows and head, and are overwritten.
        covered_b: True for rows that a folded teacher covers.
        """
        if self.kernels is not None:
            self.kernels.run(student_bV, teacher, targets_b, losses_Mb, grad=grad)
            return
        out_bV = student_bV
        zs_bV = self.space.wide("student", student_bV)
        self.student.finish_(zs_bV)
        if isinstance(teacher, Tensor):
            teacher = self.teacher_space.wide("teacher", teacher)
            if self.teacher is not None:
                self.teacher.finish_(teacher)
        slope_bV, cap = None, self.student.softcap
        if grad and cap is not None:  # dz/du of z = c·tanh(u / c), from z
            slope_bV = torch.div(zs_bV, cap, out=self.space.buffer("slope", len(zs_bV)))
            slope_bV.square_().neg_().add_(1.0)
        simple = len(self.groups) == 1 and slope_bV is None
        total_bV = self.space.buffer("total", len(out_bV)) if grad and not simple else None
        for place, group in enumerate(self.groups):
            last = place == len(self.groups) - 1
            zs_group_bV = _at_temperature(self.space, "zs", zs_bV, group, last)
            part_bV = out_bV if simple else zs_group_bV
            counted: list[Counted | Projected] = []
            if group.of_data and targets_b is not None:
                ones_b1 = zs_bV.new_ones(len(zs_bV), 1)
                counted.append(Counted(group.of_data, targets_b[:, None], ones_b1))
            out = part_bV if grad else None
            block = GroupBlock(group, zs_group_bV, counted, losses_Mb, out, self.space)
            self._run_group(block, teacher if group.of_teacher else None, covered_b, last)
            if total_bV is not None:
                total_bV.copy_(part_bV) if place == 0 else total_bV.add_(part_bV)
        if total_bV is not None:
            out_bV.copy_(total_bV if slope_bV is None else total_bV.mul_(slope_bV))

    def _run_group(
        self, block: GroupBlock, teacher: Teacher, covered_b: Tensor | None, last: bool
    ) -> None:
        group, zt_bV = block.group, None
        if isinstance(teacher, Tensor):
            zt_bV = teacher = _at_temperature(self.teacher_space, "zt", teacher, group, last)
        if self.folding is not None and isinstance(teacher, Tensor | SparseSignal | SampledSignal):
            assert covered_b is not None
            self.folding.run(block, teacher, covered_b)
            return
        if isinstance(teacher, SparseSignal):
            bucketed(block, teacher)
            return
        if isinstance(teacher, ProjectedRows):
            score_b = teacher.score_b / group.temperature
            projected = Projected(group.of_teacher, score_b, teacher.negative_entropy_b)
            block.counted = [*block.counted, projected]
        elif isinstance(teacher, SampledSignal):
            block.counted = [*block.counted, sampled(group, teacher, block.zs_bV.dtype)]
        if zt_bV is None or group.only("forward_kl"):
            forward_kl_and_counted(block, zt_bV)
        else:
            any_divergence(block, zt_bV)


def _at_temperature(space: Workspace, name: str, z_bV: Tensor, group: Group, last: bool) -> Tensor:
    """z / T: in place for the last group, otherwise in a buffer, because later groups still need
    z."""
    if last:
        return z_bV if group.temperature == 1.0 else z_bV.div_(group.temperature)
    return torch.div(z_bV, group.temperature, out=space.buffer(name, len(z_bV)))
