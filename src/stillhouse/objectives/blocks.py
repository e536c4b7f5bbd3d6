"""Losses and ∂loss/∂logits of one block of rows.

With q = softmax(z_s / T), p = softmax(z_t / T) and h = ∂loss/∂log q, every divergence has
∂loss/∂z_s = (h − q·Σh) / T. For KL(p ‖ q), h = −p, and for cross-entropy h = −onehot: both are
q minus something, and both losses need no logarithm of a whole row, since
KL(p ‖ q) = Σ p (z_t − z_s) / T − lse(z_t / T) + lse(z_s / T).

Shapes: b rows of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.objectives.head import ComputeHead
from stillhouse.objectives.terms import Term


@dataclass(frozen=True)
class Group:
    """The terms of one temperature, by their place k among all terms.

    coefficients: of each term's gradient, relative to the sum over all terms.
    """

    temperature: float
    terms: tuple[tuple[int, Term], ...]
    coefficients: tuple[float, ...]

    @property
    def needs_teacher(self) -> bool:
        return any(term.divergence != "cross_entropy" for _, term in self.terms)


def group_by_temperature(terms: Sequence[Term]) -> tuple[list[Group], float]:
    """Terms that share their softmaxes, and the factor that was taken out of all of them."""
    raw = [term.weight * term.factor / term.temperature for term in terms]
    common = sum(raw) or 1.0
    groups = []
    for temperature in sorted({term.temperature for term in terms}):
        chosen = [k for k, term in enumerate(terms) if term.temperature == temperature]
        whole = len(chosen) == len(terms) == 1
        groups.append(
            Group(
                temperature,
                tuple((k, terms[k]) for k in chosen),
                tuple(1.0 if whole and raw[k] else raw[k] / common for k in chosen),
            )
        )
    return groups, common


class Blocks:
    """Works on blocks of rows with scratch that is allocated once."""

    def __init__(
        self,
        groups: Sequence[Group],
        student: ComputeHead,
        teacher: ComputeHead | None,
        shape: tuple[int, int],
        like: Tensor,
    ) -> None:
        """`shape` is of the largest block; `like` has the device and dtype of reductions."""
        self.groups = groups
        self.student = student
        self.teacher = teacher
        self.shape = shape
        self.like = like
        self._buffers: dict[str, Tensor] = {}

    def _buffer(self, name: str, rows: int) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = self.like.new_empty(self.shape)
        return self._buffers[name][:rows]

    def _wide(self, name: str, logits_bV: Tensor) -> Tensor:
        """The logits in the dtype of reductions: themselves if they have it already."""
        if logits_bV.dtype == self.like.dtype:
            return logits_bV
        return self._buffer(name, len(logits_bV)).copy_(logits_bV)

    def run(
        self,
        student_bV: Tensor,
        teacher_bV: Tensor | None,
        targets_b: Tensor | None,
        losses_Kb: Tensor,
        *,
        grad: bool,
    ) -> None:
        """Fills the losses; with `grad`, writes ∂loss/∂(raw logits) over `student_bV`.

        Both inputs hold raw products of hidden rows and head, and are overwritten.
        """
        out_bV = student_bV
        student_bV = self._wide("student", student_bV)
        self.student.finish_(student_bV)
        if teacher_bV is not None and self.teacher is not None:
            teacher_bV = self._wide("teacher", teacher_bV)
            self.teacher.finish_(teacher_bV)
        slope_bV = self._cap_slope(student_bV) if grad else None
        simple = len(self.groups) == 1 and slope_bV is None
        total_bV = self._buffer("total", len(out_bV)) if grad and not simple else None
        for place, group in enumerate(self.groups):
            last = place == len(self.groups) - 1
            zs_bV = self._at_temperature("zs", student_bV, group.temperature, last)
            zt_bV = None
            if teacher_bV is not None and group.needs_teacher:
                zt_bV = self._at_temperature("zt", teacher_bV, group.temperature, last)
            part_bV = out_bV if simple else zs_bV
            self._kl_and_cross_entropy(
                group, zs_bV, zt_bV, targets_b, losses_Kb, part_bV if grad else None
            )
            if total_bV is not None:
                total_bV.copy_(part_bV) if place == 0 else total_bV.add_(part_bV)
        if total_bV is not None:
            out_bV.copy_(total_bV if slope_bV is None else total_bV.mul_(slope_bV))

    def _cap_slope(self, logits_bV: Tensor) -> Tensor | None:
        """dz/du of z = c·tanh(u / c), from z; None where there is no cap."""
        cap = self.student.softcap
        if cap is None:
            return None
        slope_bV = torch.div(logits_bV, cap, out=self._buffer("slope", len(logits_bV)))
        return slope_bV.square_().neg_().add_(1.0)

    def _at_temperature(self, name: str, z_bV: Tensor, temperature: float, last: bool) -> Tensor:
        """z / T: in place for the last temperature, else in a buffer."""
        if last:
            return z_bV if temperature == 1.0 else z_bV.div_(temperature)
        return torch.div(z_bV, temperature, out=self._buffer(name, len(z_bV)))

    def _kl_and_cross_entropy(
        self,
        group: Group,
        zs_bV: Tensor,
        zt_bV: Tensor | None,
        targets_b: Tensor | None,
        losses_Kb: Tensor,
        out_bV: Tensor | None,
    ) -> None:
        """Overwrites zs with q and zt with p; out = Σ coefficient · (q − p or onehot)."""
        target_b1 = None if targets_b is None else targets_b[:, None]
        target_z_b = None if target_b1 is None else zs_bV.gather(1, target_b1)[:, 0]
        gap_b = None
        if zt_bV is not None:
            gap_bV = torch.sub(zt_bV, zs_bV, out=self._buffer("gap", len(zs_bV)))
            lse_t_b = softmax_(zt_bV)
            gap_b = gap_bV.mul_(zt_bV).sum(-1).sub_(lse_t_b)
        lse_s_b = softmax_(zs_bV)
        of_teacher = of_target = 0.0
        for (k, term), coefficient in zip(group.terms, group.coefficients, strict=True):
            if term.divergence == "cross_entropy":
                assert target_z_b is not None
                torch.sub(lse_s_b, target_z_b, out=losses_Kb[k])
                of_target += coefficient
            else:
                assert gap_b is not None
                torch.add(gap_b, lse_s_b, out=losses_Kb[k]).mul_(term.factor)
                of_teacher += coefficient
        if out_bV is None:
            return
        if of_teacher + of_target != 1.0:
            zs_bV.mul_(of_teacher + of_target)
        if of_target and target_b1 is not None:
            ones_b1 = zs_bV.new_full((1, 1), -of_target).expand(len(zs_bV), 1)
            zs_bV.scatter_add_(1, target_b1, ones_b1)
        if zt_bV is not None and of_teacher:
            torch.sub(zs_bV, zt_bV, alpha=of_teacher, out=out_bV)
        elif out_bV is not zs_bV:
            out_bV.copy_(zs_bV)


def softmax_(z_bV: Tensor) -> Tensor:
    """Softmax of each row in place; returns its logsumexp, from max z − log max softmax(z).

    One exponential an element, where logsumexp beside softmax would take two. The largest
    probability of a row is at least 1/V, so that its logarithm is as exact as the softmax.
    """
    top_b = z_bV.amax(-1)
    torch.softmax(z_bV, -1, out=z_bV)
    return top_b - z_bV.amax(-1).log_()
