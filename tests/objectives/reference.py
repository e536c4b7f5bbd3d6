"""The slow, obvious loss: one token at a time, in the dtype given, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.objectives import Term
from stillhouse.signals import LMHead


def logits(hidden_D: Tensor, head: LMHead, vocab_size: int) -> Tensor:
    """The logits of one token."""
    z_V = head.weight_VD[:vocab_size] @ hidden_D
    if head.bias_V is not None:
        z_V = z_V + head.bias_V[:vocab_size]
    z_V = z_V * head.scale
    return z_V if head.softcap is None else head.softcap * torch.tanh(z_V / head.softcap)


def divergence(term: Term, zs_V: Tensor, zt_V: Tensor | None, target: int | None) -> Tensor:
    """One token's value, with T² where the term asks for it."""
    if term.divergence == "cross_entropy":
        return -torch.log_softmax(zs_V, 0)[target]
    assert zt_V is not None
    log_q = torch.log_softmax(zs_V / term.temperature, 0)
    log_p = torch.log_softmax(zt_V / term.temperature, 0)
    values = {"forward_kl": lambda: (log_p.exp() * (log_p - log_q)).sum()}
    factor = term.temperature**2 if term.t_squared else 1.0
    return values[term.divergence]() * factor


def loss(
    hidden_ND: Tensor,
    head: LMHead,
    terms: Sequence[Term],
    teacher_ND: Tensor,
    teacher_head: LMHead,
    targets_N: Tensor,
    row_weights_N: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    vocab = vocab_size or min(len(head.weight_VD), len(teacher_head.weight_VD))
    total = hidden_ND.sum() * 0 + head.weight_VD.sum() * 0
    for n in range(len(hidden_ND)):
        zs_V = logits(hidden_ND[n], head, vocab)
        zt_V = logits(teacher_ND[n], teacher_head, vocab)
        weight = 1.0 if row_weights_N is None else row_weights_N[n]
        for term in terms:
            value = divergence(term, zs_V, zt_V, int(targets_N[n]))
            total = total + weight * term.weight * value
    return total
