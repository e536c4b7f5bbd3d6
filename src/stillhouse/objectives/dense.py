"""Losses of one block of rows against a teacher's full distribution, samples of it, or the data.

With q = softmax(z_s), p = softmax(z_t), and h = ∂loss/∂log q, ∂loss/∂z_s = h − q·Σh (the
temperature's factor is in the coefficients). For KL(p ‖ q), h = −p; for cross-entropy with counted
tokens, h = −share. These two are the fast path: the gradient is q minus something, and the value
does not need the logarithm of a full row, since
KL(p ‖ q) = Σ p (z_t − z_s) − lse(z_t) + lse(z_s).

Shapes: b rows of a block, K entries of a row, M terms, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.objectives.divergences import DIVERGENCES, Pair
from stillhouse.objectives.groups import Group, Member, Workspace
from stillhouse.signals import SampledSignal, SparseSignal

IMPOSSIBLE = -1e4
"""A logit whose probability is 0 in every dtype; −inf would give −inf · 0 = NaN."""


@dataclass(frozen=True)
class ProjectedRows:
    """A block of a frozen-head signal. score_b: Wᵀp · h, before the temperature is applied."""

    score_b: Tensor
    negative_entropy_b: Tensor


Teacher = Tensor | SparseSignal | SampledSignal | ProjectedRows | None
"""Raw logits [b, V], or a block of a stored signal; None: only the data."""


@dataclass(frozen=True)
class _Target:
    members: tuple[Member, ...]

    @property
    def coefficient(self) -> float:
        return sum(member.coefficient for member in self.members)


@dataclass(frozen=True)
class Counted(_Target):
    """Each row's target tokens and their shares: the data's one token, or a teacher's samples."""

    ids_bK: Tensor
    shares_bK: Tensor

    def score(self, z_bV: Tensor) -> Tensor:
        """Σ share · z of each row."""
        return z_bV.gather(1, self.ids_bK).mul_(self.shares_bK).sum(-1)

    def write_losses(self, lse_b: Tensor, score_b: Tensor, losses_Mb: Tensor) -> None:
        for member in self.members:
            losses_Mb[member.place] = (lse_b - score_b) * member.term.factor

    def subtract_from_(self, gradient_bV: Tensor) -> None:
        if self.coefficient:
            gradient_bV.scatter_add_(1, self.ids_bK, self.shares_bK * -self.coefficient)


def sampled(group: Group, teacher: SampledSignal, dtype: torch.dtype) -> Counted:
    """The teacher's samples as the target of the group's forward KL."""
    shares_bK = teacher.counts_NK.to(dtype)
    shares_bK = shares_bK / shares_bK.sum(1, keepdim=True)
    return Counted(group.of_teacher, teacher.ids_NK, shares_bK)


@dataclass(frozen=True)
class Projected(_Target):
    """A teacher's distribution p projected through the head W: each row's Wᵀp · h and Σ p log p.

    Its part of the gradient does not go through the logits: it is added directly to the hidden
    rows.
    """

    score_b: Tensor
    negative_entropy_b: Tensor

    def score(self, z_bV: Tensor) -> Tensor:
        """Σ p · z of each row."""
        return self.score_b

    def write_losses(self, lse_b: Tensor, score_b: Tensor, losses_Mb: Tensor) -> None:
        for member in self.members:
            value_b = self.negative_entropy_b + lse_b - score_b
            losses_Mb[member.place] = value_b * member.term.factor

    def subtract_from_(self, gradient_bV: Tensor) -> None:
        """Do nothing: see the class."""


@dataclass
class GroupBlock:
    """One group's losses on a block.

    zs_bV: the student's logits at the group's temperature; overwritten.
    out_bV: receives ∂loss/∂zs; None: no gradient.
    """

    group: Group
    zs_bV: Tensor
    counted: Sequence[Counted | Projected]
    losses_Mb: Tensor
    out_bV: Tensor | None
    space: Workspace

    def scores(self) -> list[Tensor]:
        return [each.score(self.zs_bV) for each in self.counted]

    def write_losses(self, lse_b: Tensor, scores: Sequence[Tensor]) -> None:
        for each, score_b in zip(self.counted, scores, strict=True):
            each.write_losses(lse_b, score_b, self.losses_Mb)


def forward_kl_and_counted(block: GroupBlock, zt_bV: Tensor | None) -> None:
    """Compute forward KL and cross-entropies. Overwrites zt."""
    group, counted, zs_bV, out_bV = block.group, block.counted, block.zs_bV, block.out_bV
    scores = block.scores()
    of_teacher = 0.0
    gap_b = None
    if zt_bV is not None:
        gap_bV = torch.sub(zt_bV, zs_bV, out=block.space.buffer("work", len(zs_bV)))
        lse_t_b = softmax_(zt_bV)
        gap_b = gap_bV.mul_(zt_bV).sum(-1).sub_(lse_t_b)
        of_teacher = sum(member.coefficient for member in group.of_teacher)
    lse_s_b = softmax_(zs_bV)
    if gap_b is not None:
        for member in group.of_teacher:
            block.losses_Mb[member.place] = (gap_b + lse_s_b) * member.term.factor
    block.write_losses(lse_s_b, scores)
    if out_bV is None:
        return
    total_coefficient = of_teacher + sum(each.coefficient for each in counted)
    if total_coefficient != 1.0:
        zs_bV.mul_(total_coefficient)
    for each in counted:
        each.subtract_from_(zs_bV)
    if zt_bV is not None and of_teacher:
        # In place: torch.sub into a narrower tensor would allocate a temporary one.
        same = out_bV.dtype == zs_bV.dtype
        torch.sub(zs_bV, zt_bV, alpha=of_teacher, out=out_bV if same else zs_bV)
        if not same:
            out_bV.copy_(zs_bV)
    elif out_bV is not zs_bV:
        out_bV.copy_(zs_bV)


def any_divergence(block: GroupBlock, zt_bV: Tensor) -> None:
    """Compute any divergences, using their h. Overwrites zt."""
    zs_bV, out_bV, space, rows = block.zs_bV, block.out_bV, block.space, len(block.zs_bV)
    scores = block.scores()
    q_bV = space.buffer("q", rows)
    p_bV = space.buffer("p", rows)
    lse_s_b = softmax_(zs_bV, out_bV=q_bV)
    lse_t_b = softmax_(zt_bV, out_bV=p_bV)
    pair = Pair(
        score_p_bX=zt_bV,
        lse_p_b=lse_t_b,
        p_bX=p_bV,
        score_q_bX=zs_bV,
        lse_q_b=lse_s_b,
        q_bX=q_bV,
        work_bX=space.buffer("work", rows),
        more_bX=space.buffer("more", rows),
    )
    several = len(block.group.of_teacher) > 1
    h_bV = space.buffer("h", rows)
    sum_divergences(block, pair, h_bV, space.buffer("next h", rows) if several else h_bV)
    block.write_losses(lse_s_b, scores)
    for each in block.counted:
        each.subtract_from_(h_bV)
    if out_bV is None:
        return
    total_b1 = h_bV.sum(-1, keepdim=True)
    target_bV = out_bV if out_bV.dtype == h_bV.dtype else h_bV
    torch.addcmul(h_bV, q_bV, total_b1, value=-1.0, out=target_bV)
    if target_bV is not out_bV:
        out_bV.copy_(target_bV)


def sum_divergences(block: GroupBlock, pair: Pair, h_bX: Tensor, next_h_bX: Tensor) -> None:
    """Write each divergence's values, and Σ coefficient · h over the group's terms into `h_bX`."""
    for number, member in enumerate(block.group.of_teacher):
        term = member.term
        target_bX = h_bX if number == 0 else next_h_bX
        value_b = DIVERGENCES[term.divergence](pair, term, target_bX)
        block.losses_Mb[member.place] = value_b * term.factor
        if number:
            h_bX.add_(target_bX, alpha=member.coefficient)
        elif member.coefficient != 1.0:
            h_bX.mul_(member.coefficient)


def softmax_(z_bV: Tensor, out_bV: Tensor | None = None) -> Tensor:
    """Compute each row's softmax, in place or into `out_bV`, and return its logsumexp.

    lse = max z − log max softmax(z) takes one exponential per element, where softmax plus logsumexp
    would take two. A row's largest probability is at least 1/V, so its logarithm is as exact as the
    softmax.
    """
    top_b = z_bV.amax(-1)
    out_bV = torch.softmax(z_bV, -1, out=z_bV if out_bV is None else out_bV)
    return top_b - out_bV.amax(-1).log_()
