"""Loss on the likelihoods of chunks, for teachers whose tokenizer differs from the student's.

A chunk is the text between two neighboring positions where both tokenizers begin a token. Teacher
and student split it into different tokens, but both assign it a probability: the product of its
tokens' probabilities. With p and q its probabilities under teacher and student, and P and Q their
logarithms, a chunk's distance is

    binary    p (P - Q) + (1 - p) (log(1 - p) - log(1 - q)), the KL divergence of "this text" versus
              "any other" between both models, which is at most that of the full distributions
    squared   (P - Q)^2

Its derivative g with respect to Q is also its derivative with respect to the log-probability of
each of its tokens. So the gradient is that of a cross-entropy with row weights -g, and the rows go
through the head twice, a few at a time.

Shapes: N supervised rows, P rows inside chunks, C chunks, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives.chunk_loop import Plan, Work
from stillhouse.objectives.fused import FusedLoss, default_dtype
from stillhouse.objectives.input_checks import check_finite, check_ids, check_rows, same_rows
from stillhouse.objectives.objective_names import ChunkDistance
from stillhouse.objectives.terms import LossSum, Term
from stillhouse.signals import ChunkSignal, LMHead

MOST_LIKELY = -1e-6
"""Log-probabilities are at most this, so that 1 - q keeps some digits in float32."""


def chunk_loss(
    hidden_ND: Tensor,
    head: LMHead,
    signal: ChunkSignal,
    targets_N: Tensor,
    *,
    distance: ChunkDistance = "binary",
    weight: float = 1.0,
    vocab_size: int | None = None,
) -> LossSum:
    """Sum over chunks of the distance between both models' likelihoods, times `weight`.

    Divide it by the number of supervised rows, like any other term.

    Args:
        hidden_ND, head, vocab_size: as in `fused_loss`.
        signal: the teacher's log-likelihoods of the chunks.
        targets_N: the text's own next tokens, in the student's vocabulary.
        distance: "binary" or "squared"; see above.

    Raises:
        SignalError: rows, widths, or ids do not match; NaN.
    """
    vocab = vocab_size or len(head.weight_VD)
    _check(hidden_ND, head, signal, targets_N, vocab)
    rows_PD, targets_P = hidden_ND[signal.rows_P], targets_N[signal.rows_P]
    terms, dtype = (Term("cross_entropy"),), default_dtype(hidden_ND)
    plan = Plan(terms, vocab, dtype, chunk_rows=None, factor=1.0, grad=True)
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        read = Work(rows_PD, head, None, targets_P, None, plan, [False] * 3)
        read.run()
        log_p_C = signal.log_probs_C.to(read.losses_MN.dtype)
        log_q_C = torch.zeros_like(log_p_C).index_add_(0, signal.chunk_P, -read.losses_MN[0])
        value_C, slope_C = DISTANCES[distance](log_p_C, log_q_C)
        value, slope_P = value_C.sum() * weight, slope_C[signal.chunk_P] * weight
    name = f"chunks {distance}"
    if not torch.is_grad_enabled():
        return LossSum(value, {name: value_C.sum()}, len(hidden_ND))
    along, _ = FusedLoss.apply(
        rows_PD, head.weight_VD, head.bias_V, head, None, targets_P, -slope_P, plan
    )
    # `along` has the loss's gradient, but not its value.
    return LossSum(along + (value - along.detach()), {name: value_C.sum()}, len(hidden_ND))


def no_chunks(device: torch.device) -> ChunkSignal:
    """An empty signal, for a teacher with the student's tokenizer."""
    none = torch.empty(0, dtype=torch.long, device=device)
    return ChunkSignal(none, none, torch.empty(0, device=device))


def _binary(log_p_C: Tensor, log_q_C: Tensor) -> tuple[Tensor, Tensor]:
    log_p_C, log_q_C = (each.clamp(max=MOST_LIKELY) for each in (log_p_C, log_q_C))
    p_C, other_p_C, other_q_C = log_p_C.exp(), -torch.expm1(log_p_C), -torch.expm1(log_q_C)
    value_C = p_C * (log_p_C - log_q_C) + other_p_C * (other_p_C.log() - other_q_C.log())
    return value_C, other_p_C * log_q_C.exp() / other_q_C - p_C


def _squared(log_p_C: Tensor, log_q_C: Tensor) -> tuple[Tensor, Tensor]:
    gap_C = log_q_C - log_p_C
    return gap_C.square(), 2 * gap_C


DISTANCES = {"binary": _binary, "squared": _squared}
"""(log p, log q) -> each chunk's distance, and its derivative with respect to log q."""


def _check(
    hidden_ND: Tensor, head: LMHead, signal: ChunkSignal, targets_N: Tensor, vocab: int
) -> None:
    check_rows("hidden_ND", hidden_ND, head)
    same_rows("targets_N", targets_N, len(hidden_ND))
    if signal.rows_P.shape != signal.chunk_P.shape or signal.log_probs_C.ndim != 1:
        raise SignalError(
            f"shapes do not match: signal.rows_P {tuple(signal.rows_P.shape)}, signal.chunk_P "
            f"{tuple(signal.chunk_P.shape)}, signal.log_probs_C {tuple(signal.log_probs_C.shape)}",
            fix="pass one chunk number per row, and one log-probability per chunk",
        )
    check_ids("signal.rows_P", signal.rows_P, len(hidden_ND))
    check_ids("signal.chunk_P", signal.chunk_P, len(signal.log_probs_C))
    check_ids("targets_N", targets_N, vocab)
    check_finite("signal.log_probs_C", signal.log_probs_C)
