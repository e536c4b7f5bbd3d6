"""A slow and obvious loss: one token at a time, in the dtype of its inputs, with autograd.

Its formulas are the definitions of the divergences, not the gradients that the fast code uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.objectives import Term
from stillhouse.signals import (
    DenseSignal,
    FoldedSignal,
    LMHead,
    LogitsSignal,
    SampledSignal,
    Signal,
    SparseSignal,
)


def logits(hidden_D: Tensor, head: LMHead, vocab_size: int) -> Tensor:
    """The logits of one token."""
    z_V = head.weight_VD[:vocab_size] @ hidden_D
    if head.bias_V is not None:
        z_V = z_V + head.bias_V[:vocab_size]
    z_V = z_V * head.scale
    return z_V if head.softcap is None else head.softcap * torch.tanh(z_V / head.softcap)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def mixture(weight: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(weight · a + (1 − weight) · b)."""
    if weight == 1.0:
        return log_a
    if weight == 0.0:
        return log_b
    log_weight = torch.tensor([weight, 1 - weight], dtype=log_a.dtype).log()
    return torch.logaddexp(log_a + log_weight[0], log_b + log_weight[1])


def jsd(beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = mixture(beta, log_p, log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def normalized_jsd(beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    if beta == 0.0:
        return kl(log_p, log_q)
    if beta == 1.0:
        return kl(log_q, log_p)
    return jsd(beta, log_p, log_q) / (beta * (1 - beta))


def alpha_beta(a: float, b: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    if a == 0.0:
        return (q**b * (log_q - log_p) * b - q**b + p**b).sum() / b**2
    if b == 0.0:
        return (p**a * (log_p - log_q) * a - p**a + q**a).sum() / a**2
    inner = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -inner.sum() / (a * b)


def adaptive_kl(mu: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp().detach()
    mass = 0.0
    head: list[int] = []
    for token in p.argsort(descending=True).tolist():
        if mass >= mu and head:
            break
        head.append(token)
        mass += float(p[token])
    gaps = (p - q).abs()
    share = gaps[head].sum() / gaps.sum().clamp_min(1e-300)
    return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)


def divergence(term: Term, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence between two distributions over the same outcomes."""
    known = term.parameters
    formulas = {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jsd": lambda: jsd(known["beta"], log_p, log_q),
        "normalized_jsd": lambda: normalized_jsd(known["beta"], log_p, log_q),
        "skew_forward_kl": lambda: kl(log_p, mixture(known["alpha"], log_p, log_q)),
        "skew_reverse_kl": lambda: kl(log_q, mixture(known["alpha"], log_q, log_p)),
        "total_variation": lambda: (log_p.exp() - log_q.exp()).abs().sum() / 2,
        "alpha_beta": lambda: alpha_beta(known["alpha"], known["beta"], log_p, log_q),
        "adaptive_kl": lambda: adaptive_kl(known["mu"], log_p, log_q),
    }
    return formulas[term.divergence]()


def buckets(signal: SparseSignal, n: int, log_q_V: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q of the K tokens and of the tail; log p is at least −100."""
    ids = signal.ids_NK[n].tolist()
    others = [token for token in range(len(log_q_V)) if token not in ids]
    log_p = torch.cat([signal.log_probs_NK[n], signal.tail_N[n].log()[None]]).clamp_min(-100.0)
    log_tail = log_q_V[others].logsumexp(0) if others else log_q_V.new_tensor(-1000.0)
    return log_p, torch.cat([log_q_V[ids], log_tail[None]])


def log_of_roots(log_p_X: Tensor, roots_X: Tensor, roots: int) -> Tensor:
    """The logarithm of each root's probability: the sum over the tokens that map to it."""
    of_root = [(roots_X == root).nonzero()[:, 0] for root in range(roots)]
    return torch.stack([log_p_X[tokens].logsumexp(0) for tokens in of_root])


def token_value(
    term: Term, zs_V: Tensor, signal: Signal | None, n: int, target: int, vocab: int
) -> Tensor:
    """One token's value, multiplied by T² if the term requires it."""
    if term.divergence == "cross_entropy":
        return -torch.log_softmax(zs_V, 0)[target]
    factor = term.temperature**2 if term.t_squared else 1.0
    log_q_V = torch.log_softmax(zs_V / term.temperature, 0)
    if isinstance(signal, FoldedSignal):
        if not bool(signal.covered_N[n]):
            return zs_V.sum() * 0
        fold, signal = signal.fold, signal.signal
        log_q_V = log_of_roots(log_q_V, fold.student_V, fold.roots)
        if isinstance(signal, DenseSignal):
            zt_W = logits(signal.hidden_ND[n], signal.head, len(fold.teacher_W))
            log_p_W = torch.log_softmax(zt_W / term.temperature, 0)
            log_p_R = log_of_roots(log_p_W, fold.teacher_W, fold.roots)
            return divergence(term, log_p_R, log_q_V) * factor
    if isinstance(signal, SparseSignal):
        return divergence(term, *buckets(signal, n, log_q_V)) * factor
    if isinstance(signal, SampledSignal):
        shares = signal.counts_NK[n] / signal.counts_NK[n].sum()
        return -(shares * log_q_V[signal.ids_NK[n]]).sum() * factor
    if isinstance(signal, LogitsSignal):
        zt_V = signal.logits_NV[n, :vocab]
    else:
        assert isinstance(signal, DenseSignal)
        zt_V = logits(signal.hidden_ND[n], signal.head, vocab)
    log_p_V = torch.log_softmax(zt_V / term.temperature, 0)
    return divergence(term, log_p_V, log_q_V) * factor


def loss(
    hidden_ND: Tensor,
    head: LMHead,
    terms: Sequence[Term],
    signal: Signal | None,
    targets_N: Tensor,
    row_weights_N: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    vocab = vocab_size or len(head.weight_VD)
    if vocab_size is None and isinstance(signal, DenseSignal):
        vocab = min(vocab, len(signal.head.weight_VD))
    if isinstance(signal, FoldedSignal):
        vocab = len(signal.fold.student_V)
    if vocab_size is None and isinstance(signal, LogitsSignal):
        vocab = min(vocab, signal.logits_NV.shape[1])
    total = hidden_ND.sum() * 0 + head.weight_VD.sum() * 0
    for n in range(len(hidden_ND)):
        zs_V = logits(hidden_ND[n], head, vocab)
        weight = 1.0 if row_weights_N is None else row_weights_N[n]
        for term in terms:
            value = token_value(term, zs_V, signal, n, int(targets_N[n]), vocab)
            total = total + weight * term.weight * value
    return total
