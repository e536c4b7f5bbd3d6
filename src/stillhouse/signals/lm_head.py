"""Logits, log-probabilities, and KL divergences from hidden states and a head.

Shapes: N rows, n rows of a chunk, D hidden width, V vocabulary, R roots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.cpu_products import fast_linear
from stillhouse.signals.signal_types import LMHead

CHUNK_LOGITS = 1 << 23
"""Logits of one model in memory at a time: at most 32 MiB, regardless of the vocabulary."""


def head_logits(head: LMHead, hidden_ND: Tensor) -> Tensor:
    """Compute softcap(scale · (h Wᵀ + b)), [N, V], in float32 or wider.

    The product is computed in the head's dtype. It is not chunked, so use it for a few rows only.
    """
    hidden_ND = hidden_ND.to(head.weight_VD.dtype)
    with fast_linear(hidden_ND.device):
        logits_NV = torch.nn.functional.linear(hidden_ND, head.weight_VD, head.bias_V)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if head.scale != 1.0:
        logits_NV = logits_NV * head.scale
    if head.softcap is not None:
        logits_NV = logits_NV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_NV


def log_probabilities(head: LMHead, hidden_ND: Tensor) -> Tensor:
    """The log-softmax of `head_logits`, float32 [N, V]."""
    return head_logits(head, hidden_ND).float().log_softmax(-1)


def target_log_probabilities(head: LMHead, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probability of each row's target, float32 [N], computed a few rows at a time."""
    found = [
        log_probabilities(head, hidden_ND[rows]).gather(1, targets_N[rows, None])[:, 0]
        for rows in row_chunks(head, len(hidden_ND))
    ]
    return torch.cat(found) if found else targets_N.new_empty(0, dtype=torch.float32)


def row_chunks(head: LMHead, rows: int) -> list[slice]:
    """Slices of rows that have at most CHUNK_LOGITS logits, and at most half as many as the head
    has weights."""
    vocabulary, hidden = head.weight_VD.shape
    size = max(1, min(CHUNK_LOGITS // vocabulary, hidden // 2))
    return [slice(start, start + size) for start in range(0, rows, size)]


def folded_log_probabilities(log_p_NV: Tensor, roots_V: Tensor, roots: int) -> Tensor:
    """The log-probability of each root, float32 [N, R], summed over its tokens. Tokens beyond
    `roots_V` are padding."""
    probabilities_NV = log_p_NV[:, : len(roots_V)].exp()
    tiny = torch.finfo(probabilities_NV.dtype).tiny
    sums_NR = probabilities_NV.new_full((len(log_p_NV), roots), tiny)
    roots_NV = roots_V.to(log_p_NV.device).expand_as(probabilities_NV)
    return sums_NR.scatter_add_(1, roots_NV, probabilities_NV).log_()


def kl_of_rows(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p ‖ q) of each row in nats, [N]."""
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def summed_kl(
    head: LMHead, full_ND: Tensor, others: Sequence[Tensor], other_head: LMHead | None = None
) -> list[float]:
    """The sum over rows of KL(softmax of full ‖ softmax of other), in nats, for each of `others`.

    others: hidden states [N, D]. other_head: theirs, if it is not the full model's. A few rows are
    computed at a time, and the full model's distribution only once. Pruning and searches depend on
    these sums, so the order of summation is fixed: over a complete chunk in float32, not row by row
    as in `kl_of_rows`.
    """
    other_head = head if other_head is None else other_head
    totals = [0.0] * len(others)
    for chunk in row_chunks(head, len(full_ND)):
        full_nV = log_probabilities(head, full_ND[chunk])
        probability_nV = full_nV.exp()
        for place, other_ND in enumerate(others):
            other_nV = log_probabilities(other_head, other_ND[chunk])
            totals[place] -= other_nV.sub_(full_nV).mul_(probability_nV).sum().item()
    return totals
