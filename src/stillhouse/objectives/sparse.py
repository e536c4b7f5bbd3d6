"""Losses of one block of rows against a teacher's top K tokens and the mass of all others.

The outcomes are B = K + 1 buckets: each of the K tokens, and the tail. Every divergence is computed
between the two distributions over buckets. With r the softmax of z_s over only the tail's tokens
(so that q_j = q_tail · r_j there) and g = h − q·Σh over buckets, ∂loss/∂z_j is g_j for a token
among the K and r_j · g_tail in the tail. This takes one softmax per row, and never computes the
tail as 1 minus the rest, which would lose precision.

Shapes: b rows of a block, K entries of a row, B = K + 1 buckets, M terms, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.objectives.dense import GroupBlock, softmax_, sum_divergences
from stillhouse.objectives.divergences import Pair
from stillhouse.signals import SparseSignal

LOG_FLOOR = -100.0
"""Stands in for log 0, so that 0 · log 0 is 0 and not NaN."""


def bucketed(block: GroupBlock, teacher: SparseSignal) -> None:
    """Compute any divergences over buckets."""
    zs_bV, out_bV, counted = block.zs_bV, block.out_bV, block.counted
    scores = block.scores()
    filling_bK = teacher.ids_NK == teacher.ids_NK[:, :1]  # Short rows repeat their first token.
    filling_bK[:, 0] = False
    z_bK = zs_bV.gather(1, teacher.ids_NK).masked_fill_(filling_bK, -torch.inf)
    lse_tail_b = _softmax_of_the_rest_(zs_bV, teacher.ids_NK)
    z_bB = torch.cat([z_bK, lse_tail_b[:, None]], 1)
    lse_b = z_bB.logsumexp(1)
    log_q_bB = z_bB.sub_(lse_b[:, None]).clamp_(min=LOG_FLOOR * 10)
    log_p_bB = torch.cat([teacher.log_probs_NK, teacher.tail_N.log()[:, None]], 1)
    log_p_bB = log_p_bB.to(log_q_bB.dtype).clamp_(min=LOG_FLOOR)
    p_bB = torch.cat([teacher.log_probs_NK.exp(), teacher.tail_N[:, None]], 1).to(log_q_bB.dtype)
    buffers = torch.empty_like(log_q_bB), torch.empty_like(log_q_bB)
    pair = Pair.of_logs(log_p_bB, p_bB, log_q_bB, log_q_bB.exp(), *buffers)
    h_bB = torch.empty_like(log_q_bB)
    sum_divergences(block, pair, h_bB, torch.empty_like(log_q_bB))
    block.write_losses(lse_b, scores)
    if out_bV is None:
        return
    of_data = sum(each.coefficient for each in counted)
    g_bB = h_bB.addcmul_(pair.q_bX, of_data - h_bB.sum(1, keepdim=True))
    zs_bV.mul_(g_bB[:, -1:])
    g_bK = torch.where(filling_bK, g_bB[:, :1], g_bB[:, :-1])
    zs_bV.scatter_(1, teacher.ids_NK, g_bK)
    for each in counted:
        each.subtract_from_(zs_bV)
    if out_bV is not zs_bV:
        out_bV.copy_(zs_bV)


def _softmax_of_the_rest_(z_bV: Tensor, ids_bK: Tensor) -> Tensor:
    """Compute, in place, the softmax over the tokens not in `ids`; return their logsumexp."""
    if ids_bK.shape[1] == z_bV.shape[1]:
        z_bV.zero_()
        return z_bV.new_full((len(z_bV),), -torch.inf)
    z_bV.scatter_(1, ids_bK, -torch.inf)
    return softmax_(z_bV)
