"""Losses of one block of rows against a teacher with a different vocabulary, over shared roots.

A root r has the probability Q_r = Σ q_j over the student's tokens j with that root, and P_r is
defined likewise for the teacher; both sum to 1. Every divergence is computed between P and Q. With
h = ∂loss/∂log Q, ∂loss/∂z_j = q_j (h_r / Q_r − Σh) for a token j with root r. If the vocabularies
are equal, then Q_r = q_j, and this is the usual h_j − q_j Σh.

Shapes: b rows of a block, V student tokens, W teacher tokens, R roots.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stillhouse.objectives.dense import (
    GroupBlock,
    forward_kl_and_counted,
    sampled,
    softmax_,
    sum_divergences,
)
from stillhouse.objectives.divergences import Pair
from stillhouse.objectives.groups import Group, Workspace
from stillhouse.objectives.sparse import bucketed
from stillhouse.signals import Fold, SampledSignal, SparseSignal


class Folding:
    """Folds blocks of rows into roots, reusing scratch that is allocated once."""

    def __init__(self, fold: Fold, space: Workspace) -> None:
        """space: scratch with the width of the student's vocabulary."""
        rows, _ = space.shape
        self.maps, self.space = fold, space
        self.teacher_space = Workspace((rows, len(fold.teacher_W)), space.like)
        self.root_space = Workspace((rows, fold.roots), space.like)

    def run(
        self, block: GroupBlock, teacher: Tensor | SparseSignal | SampledSignal, covered_b: Tensor
    ) -> None:
        """Compute divergences over roots, and cross-entropies over the student's own tokens.

        teacher: logits [b, W] at the group's temperature, overwritten; or a signal over roots. Rows
        that are not covered get neither loss nor gradient from the teacher.
        """
        q_bV, out_bV, scores = block.zs_bV, block.out_bV, block.scores()
        block.write_losses(softmax_(q_bV), scores)
        sums_bR = self._sums("Q", q_bV, self.maps.student_V)
        if isinstance(teacher, SparseSignal | SampledSignal):
            factor_bR = self._stored(block, sums_bR, teacher)
        elif block.group.only("forward_kl"):
            factor_bR = self._forward_kl(block, sums_bR, teacher)
        else:
            factor_bR = self._any_divergence(block, sums_bR, teacher)
        for member in block.group.of_teacher:
            block.losses_Mb[member.place].mul_(covered_b)
        if out_bV is None:
            return
        of_data = sum(each.coefficient for each in block.counted)
        if of_data:
            factor_bR.add_(of_data)
        # On an accelerator, reading the mask would stall the queue.
        if covered_b.device.type != "cpu" or not bool(covered_b.all()):
            factor_bR.masked_fill_(~covered_b[:, None], of_data)
        work_bV = self.space.buffer("work", len(q_bV))
        torch.index_select(factor_bR, 1, self.maps.student_V, out=work_bV)
        q_bV.mul_(work_bV)
        for each in block.counted:
            each.subtract_from_(q_bV)
        if out_bV is not q_bV:
            out_bV.copy_(q_bV)

    # Each of the following methods writes the losses and returns h / Q − Σh over the roots.

    def _forward_kl(self, block: GroupBlock, sums_bR: Tensor, teacher_bW: Tensor) -> Tensor:
        """KL(P ‖ Q) = Σ P log(P / Q). Its h is −P, so only the ratio P / Q is needed."""
        softmax_(teacher_bW)
        p_bR = self._sums("P", teacher_bW, self.maps.teacher_W)
        ratio_bR = torch.div(p_bR, sums_bR, out=self.root_space.buffer("h", len(p_bR)))
        value_b = torch.xlogy(p_bR, ratio_bR, out=p_bR).sum(1)
        for member in block.group.of_teacher:
            block.losses_Mb[member.place] = value_b * member.term.factor
        coefficient = sum(member.coefficient for member in block.group.of_teacher)
        constant = torch.full_like(value_b[:1], coefficient)
        return torch.add(constant, ratio_bR, alpha=-coefficient, out=ratio_bR)

    def _stored(
        self, block: GroupBlock, sums_bR: Tensor, teacher: SparseSignal | SampledSignal
    ) -> Tensor:
        """Any divergence from a sparse signal, or forward KL from samples, with log Q as logits:
        their softmax is Q, and their gradient sums to 0."""
        inner = self._over_roots(block, sums_bR)
        if isinstance(teacher, SparseSignal):
            bucketed(inner, teacher)
        else:
            inner.counted = [sampled(block.group, teacher, sums_bR.dtype)]
            forward_kl_and_counted(inner, None)
        return self.root_space.buffer("h", len(sums_bR)).div_(sums_bR)

    def _over_roots(self, block: GroupBlock, sums_bR: Tensor) -> GroupBlock:
        """The teacher's terms of the block, with log Q as the student's logits."""
        rows = len(sums_bR)
        return replace(
            block,
            group=Group(block.group.temperature, block.group.of_teacher),
            zs_bV=torch.log(sums_bR, out=self.root_space.buffer("log Q", rows)),
            counted=(),
            out_bV=self.root_space.buffer("h", rows),
            space=self.root_space,
        )

    def _any_divergence(self, block: GroupBlock, sums_bR: Tensor, teacher_bW: Tensor) -> Tensor:
        rows, space = len(sums_bR), self.root_space
        inner = self._over_roots(block, sums_bR)
        softmax_(teacher_bW)
        p_bR = self._sums("P", teacher_bW, self.maps.teacher_W)
        log_p_bR = torch.log(p_bR, out=space.buffer("log P", rows))
        buffers = space.buffer("work", rows), space.buffer("more", rows)
        pair = Pair.of_logs(log_p_bR, p_bR, inner.zs_bV, sums_bR, *buffers)
        h_bR = space.buffer("h", rows)
        several = len(inner.group.members) > 1
        sum_divergences(inner, pair, h_bR, space.buffer("next h", rows) if several else h_bR)
        total_b1 = h_bR.sum(1, keepdim=True)
        return h_bR.div_(sums_bR).sub_(total_b1)

    def _sums(self, name: str, p_bX: Tensor, roots_X: Tensor) -> Tensor:
        """Each root's probability, plus the smallest normal number, so that none underflows to
        0."""
        sums_bR = self.root_space.buffer(name, len(p_bX))
        sums_bR.fill_(torch.finfo(sums_bR.dtype).tiny)
        return sums_bR.scatter_add_(1, roots_X.expand(len(p_bX), -1), p_bX)
