"""The LM head and its losses in one autograd function, with gradients in closed form.

Rows are processed in chunks: logits of both models, the losses, ∂loss/∂logits (overwriting the
student's logits), then the two products that carry it to the hidden rows and to the head. No [N, V]
tensor exists, the head's gradient is summed in float32, and backward is one multiplication.

Shapes: N rows, M terms, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.objectives.chunk_loop import Plan, Work
from stillhouse.objectives.input_checks import check_inputs
from stillhouse.objectives.terms import LossSum, Term, term_names
from stillhouse.signals import LMHead, Signal


def fused_loss(
    hidden_ND: Tensor,
    head: LMHead,
    terms: Sequence[Term],
    *,
    signal: Signal | None = None,
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
        signal: the teacher's, for the same rows; None if no term needs one.
        targets_N: the data's own next tokens, for `cross_entropy`.
        row_weights_N: a factor for each row; None: 1.
        scale: a factor for `total` only, such as 1 / the global number of supervised rows.
        vocab_size: rows of both heads that are real tokens; rows of padding beyond them get
            probability 0. None: as many as both heads have.
        chunk_rows: rows whose logits exist at a time; None: by the device and the vocabulary.
        compute_dtype: of the matrix products; None: as `default_dtype`. Reductions are in
            float32 (float64 if that is the compute dtype).

    Returns:
        The sums. `total` is connected to the graph even with no rows at all.

    Raises:
        SignalError: rows, widths, ids or weights that do not match; NaN.
    """
    terms = tuple(terms)
    names = term_names(terms)
    vocab = check_inputs(hidden_ND, head, terms, signal, targets_N, row_weights_N, vocab_size)
    plan = Plan(
        terms=terms,
        vocab_size=vocab,
        dtype=compute_dtype or default_dtype(hidden_ND),
        chunk_rows=chunk_rows,
        factor=1.0 if isinstance(scale, Tensor) else float(scale),
        grad=torch.is_grad_enabled(),
    )
    total, sums_M = FusedLoss.apply(
        hidden_ND, head.weight_VD, head.bias_V, head, signal, targets_N, row_weights_N, plan
    )
    if isinstance(scale, Tensor):
        total = total * scale
    return LossSum(total, dict(zip(names, sums_M.unbind(), strict=True)), hidden_ND.shape[0])


def default_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Autocast's number type if it is enabled, otherwise the hidden rows' own."""
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_ND.dtype


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: LMHead,
        signal: Signal | None,
        targets_N: Tensor | None,
        row_weights_N: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        needs = [plan.grad and need for need in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            work = Work(hidden_ND, head, signal, targets_N, row_weights_N, plan, needs)
            work.run()
        ctx.save_for_backward(*work.gradients())
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        sums_M = work.term_sums()
        # Python numbers, one by one: copying a tensor of them would stall the GPU.
        weighted = (sum_ * term.weight for sum_, term in zip(sums_M, plan.terms, strict=True))
        total = sum(weighted, sums_M.new_zeros(())) * plan.factor
        ctx.mark_non_differentiable(sums_M)
        return total, sums_M

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
