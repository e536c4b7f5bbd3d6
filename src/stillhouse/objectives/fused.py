"""The LM head and its losses in one autograd function, with closed-form gradients.

Each chunk of rows goes through these steps: logits of both models, losses, ∂loss/∂logits (which
overwrites the student's logits), and the two products that carry it back to the hidden rows and to
the head. No [N, V] tensor ever exists, and backward is one multiplication. The head's gradient is
summed in float32, except for a few 16-bit chunks on a CPU (`Plan.head_sum_dtype`).

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
    """Compute a weighted sum of divergences between teacher and student, summed over rows.

    Args:
        hidden_ND: the student's last hidden states (after the final norm), supervised rows only.
        head: the student's LM head. If its weight requires no gradient, that product is skipped.
        terms: the divergences to sum; see `Term`.
        signal: the teacher's signal for the same rows; None if no term needs one.
        targets_N: the data's own next tokens, for `cross_entropy`.
        row_weights_N: a factor for each row; None: 1.
        scale: a factor for `total` only, such as 1 / the global number of supervised rows.
        vocab_size: number of rows of both heads that are real tokens; padding rows after them get
            probability 0. None: all rows that both heads have.
        chunk_rows: number of rows whose logits exist at the same time; None: chosen by device,
            hidden width, and dtype.
        compute_dtype: dtype of the matrix products; None: see `default_dtype`. Reductions are in
            float32, or in float64 if that is the compute dtype.

    Returns:
        The sums. `total` is connected to the graph even if there are no rows.

    Raises:
        SignalError: rows, widths, ids, or weights do not match, or a value is NaN.
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
    """Autocast's dtype if autocast is enabled, otherwise the hidden rows' dtype."""
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
        # Multiply by Python numbers one by one: copying a tensor of them would stall the GPU.
        weighted = (sum_ * term.weight for sum_, term in zip(sums_M, plan.terms, strict=True))
        total = sum(weighted, sums_M.new_zeros(())) * plan.factor
        ctx.mark_non_differentiable(sums_M)
        return total, sums_M

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since the head's gradient is the largest tensor here. Autograd's version check
        # catches a second backward through the same graph, which would scale twice.
        unit = grad.device.type == "cpu" and grad.item() == 1.0
        out: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is None:
                out.append(None)
                continue
            out.append((gradient if unit else gradient.mul_(grad)).to(dtype))
        return (*out, None, None, None, None, None)
