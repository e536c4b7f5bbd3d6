"""The LM head and its losses in one autograd function, with gradients in closed form.

Rows are worked through in chunks: logits of both models, the losses, ∂loss/∂logits in place of
the student's logits, then the two products that carry it to the hidden rows and to the head.
No [N, V] tensor exists, the head's gradient is summed in float32, and backward is one multiply.

Shapes: N rows, n rows of a chunk, b rows of a block, K terms, D hidden width, V vocabulary.
A *chunk* is large enough for fast matrix products; a *block* is small enough that its float32
scratch stays in the processor's cache while some ten elementwise passes go over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.objectives.blocks import Blocks, group_by_temperature
from stillhouse.objectives.checks import check_inputs
from stillhouse.objectives.head import ComputeHead
from stillhouse.objectives.products import accumulate_outer_
from stillhouse.objectives.terms import LossSum, Term, term_names
from stillhouse.signals import DenseSignal, LMHead

CHUNK_ROWS_CPU = 256
CHUNK_ROWS_CUDA = 2048
CHUNK_BYTES_CPU = 32 << 20
"""At most this much for one model's logits of a chunk on a CPU."""
BLOCK_ELEMENTS_CPU = 16 * 49152


def fused_loss(
    hidden_ND: Tensor,
    head: LMHead,
    terms: Sequence[Term],
    *,
    signal: DenseSignal | None = None,
    targets_N: Tensor | None = None,
    row_weights_N: Tensor | None = None,
    scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> LossSum:
    """Sum over rows of a mixture of divergences between teacher and student.

    Args:
        hidden_ND: the student's last hidden states (after the final norm), supervised rows only.
        head: the student's LM head. A weight that needs no gradient costs no gradient product.
        terms: what to sum; see `Term`.
        signal: the teacher's answer for the same rows; None where no term needs one.
        targets_N: the data's own next tokens, for `cross_entropy`.
        row_weights_N: a factor for each row; 1 where None.
        scale: a factor for `total` alone, such as 1 / the global number of supervised rows.
        vocab_size: rows of both heads that are real tokens; padded rows beyond have
            probability 0. None: as many as both heads have.
        chunk_rows: rows whose logits exist at one time; None: by the device and the vocabulary.
        compute_dtype: of the matrix products. None: autocast's where it is on, else the
            hidden rows' own. Reductions are in float32 (float64 if that is the compute dtype).

    Returns:
        The sums. `total` is connected to the graph even with no rows at all.

    Raises:
        SignalError: rows, widths, ids or weights that do not fit together; NaN.
    """
    terms = tuple(terms)
    names = term_names(terms)
    vocab = check_inputs(hidden_ND, head, terms, signal, targets_N, row_weights_N, vocab_size)
    plan = _Plan(
        terms=terms,
        vocab_size=vocab,
        dtype=compute_dtype or _default_dtype(hidden_ND),
        chunk_rows=chunk_rows,
        factor=1.0 if isinstance(scale, Tensor) else float(scale),
        grad=torch.is_grad_enabled(),
    )
    total, sums_K = _FusedLoss.apply(
        hidden_ND, head.weight_VD, head.bias_V, head, signal, targets_N, row_weights_N, plan
    )
    if isinstance(scale, Tensor):
        total = total * scale
    return LossSum(total, dict(zip(names, sums_K.unbind(), strict=True)), hidden_ND.shape[0])


def _default_dtype(hidden_ND: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_ND.dtype


@dataclass(frozen=True)
class _Plan:
    """Everything that is not a tensor."""

    terms: tuple[Term, ...]
    vocab_size: int
    dtype: torch.dtype
    chunk_rows: int | None
    factor: float
    grad: bool

    @property
    def reduce_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def chunk(self, device: torch.device) -> int:
        if self.chunk_rows is not None:
            return max(1, self.chunk_rows)
        if device.type != "cpu":
            return CHUNK_ROWS_CUDA
        fit = CHUNK_BYTES_CPU // (self.vocab_size * self.dtype.itemsize)
        return min(CHUNK_ROWS_CPU, max(32, fit))

    def block(self, device: torch.device) -> int:
        if device.type != "cpu":
            return self.chunk(device)
        return max(1, BLOCK_ELEMENTS_CPU // self.vocab_size)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: LMHead,
        signal: DenseSignal | None,
        targets_N: Tensor | None,
        row_weights_N: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        needs = [plan.grad and need for need in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            work = _Work(hidden_ND, head, signal, targets_N, row_weights_N, plan, needs)
            work.run()
        ctx.save_for_backward(*work.gradients())
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        sums_K = work.term_sums()
        weights_K = sums_K.new_tensor([term.weight for term in plan.terms])
        total = (sums_K * weights_K).sum() * plan.factor
        ctx.mark_non_differentiable(sums_K)
        return total, sums_K

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the head's gradient is the largest tensor here. A second backward through
        # the same graph is caught by autograd's version check instead of scaling twice.
        unit = grad.device.type == "cpu" and grad.item() == 1.0
        out: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is None:
                out.append(None)
                continue
            out.append((gradient if unit else gradient.mul_(grad)).to(dtype))
        return (*out, None, None, None, None, None)


class _Work:
    """One call: what it needs in the compute dtype, its results, and the loop over chunks."""

    def __init__(
        self,
        hidden_ND: Tensor,
        head: LMHead,
        signal: DenseSignal | None,
        targets_N: Tensor | None,
        row_weights_N: Tensor | None,
        plan: _Plan,
        needs: list[bool],
    ) -> None:
        self.plan = plan
        self.rows = len(hidden_ND)
        self.hidden_ND = hidden_ND.detach().to(plan.dtype)
        self.head = ComputeHead.of(head, plan.vocab_size, plan.dtype)
        self.targets_N = targets_N
        self.weights_N = None if row_weights_N is None else row_weights_N.to(plan.reduce_dtype)
        self.teacher: ComputeHead | None = None
        self.teacher_hidden_ND: Tensor | None = None
        self.groups, common = group_by_temperature(plan.terms)
        if signal is not None and any(group.needs_teacher for group in self.groups):
            self.teacher = ComputeHead.of(signal.head, plan.vocab_size, plan.dtype)
            self.teacher_hidden_ND = signal.hidden_ND.detach().to(plan.dtype)
        self.factor = common * plan.factor * self.head.scale
        wide = hidden_ND.new_empty(0, dtype=plan.reduce_dtype)
        self.losses_KN = wide.new_zeros(len(plan.terms), self.rows)
        self.dhidden_ND = torch.empty_like(self.hidden_ND) if needs[0] else None
        self.dweight_VD = wide.new_empty(head.weight_VD.shape) if needs[1] else None
        self.dbias_V = wide.new_zeros(len(head.weight_VD)) if needs[2] else None
        if self.dweight_VD is not None:
            self.dweight_VD[plan.vocab_size if self.rows else 0 :].zero_()

    def run(self) -> None:
        plan, device = self.plan, self.hidden_ND.device
        chunk = min(plan.chunk(device), max(1, self.rows))
        block = min(plan.block(device), chunk)
        student_nV = self.hidden_ND.new_empty(chunk, plan.vocab_size)
        teacher_nV = None if self.teacher is None else torch.empty_like(student_nV)
        blocks = Blocks(
            self.groups, self.head, self.teacher, (block, plan.vocab_size), self.losses_KN
        )
        grad = any(g is not None for g in self.gradients())
        for start in range(0, self.rows, chunk):
            rows = slice(start, min(start + chunk, self.rows))
            n = rows.stop - rows.start
            self.head.raw_logits(self.hidden_ND[rows], student_nV[:n])
            if self.teacher is not None and self.teacher_hidden_ND is not None:
                assert teacher_nV is not None
                self.teacher.raw_logits(self.teacher_hidden_ND[rows], teacher_nV[:n])
            for low in range(0, n, block):
                part = slice(low, min(low + block, n))
                here = slice(start + low, start + part.stop)
                blocks.run(
                    student_nV[part],
                    None if teacher_nV is None else teacher_nV[part],
                    None if self.targets_N is None else self.targets_N[here],
                    self.losses_KN[:, here],
                    grad=grad,
                )
            if grad:
                self._carry_back(student_nV[:n], rows)
        if self.dhidden_ND is not None:
            self._scale_rows_(self.dhidden_ND, slice(None), self.factor)

    def _carry_back(self, dlogits_nV: Tensor, rows: slice) -> None:
        """∂loss/∂logits to the hidden rows, the weight and the bias."""
        if self.dhidden_ND is not None:
            torch.mm(dlogits_nV, self.head.weight_VD, out=self.dhidden_ND[rows])
        vocab = self.plan.vocab_size
        if self.dweight_VD is not None:
            hidden_nD = self.hidden_ND[rows]
            if self.weights_N is not None:
                hidden_nD = self._scale_rows_(hidden_nD.clone(), rows, 1.0)
            accumulate_outer_(
                self.dweight_VD[:vocab], dlogits_nV, hidden_nD, self.factor, first=rows.start == 0
            )
        if self.dbias_V is not None:
            weights_n = self._scale_rows_(self.dbias_V.new_ones(len(dlogits_nV), 1), rows, 1.0)
            wide_nV = dlogits_nV.to(weights_n.dtype)
            self.dbias_V[:vocab].add_((wide_nV.T @ weights_n)[:, 0], alpha=self.factor)

    def _scale_rows_(self, tensor_nX: Tensor, rows: slice, factor: float) -> Tensor:
        if self.weights_N is not None:
            tensor_nX.mul_((self.weights_N[rows, None] * factor).to(tensor_nX.dtype))
        elif factor != 1.0:
            tensor_nX.mul_(factor)
        return tensor_nX

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.dhidden_ND, self.dweight_VD, self.dbias_V

    def term_sums(self) -> Tensor:
        if self.weights_N is None:
            return self.losses_KN.sum(1)
        return self.losses_KN @ self.weights_N
