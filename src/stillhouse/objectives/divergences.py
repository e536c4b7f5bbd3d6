"""Every divergence between a teacher's p and a student's q: its value and h = ∂value/∂log q.

For all of them the gradient with respect to the logits is ∂value/∂z = (h − q·Σh) / T; see
docs/objectives.md. A summand of h that is a constant times q cancels there, so it is left out.
Operations are in place because, on a CPU, each pass over [b, X] is a large share of the total cost.

Shapes: b rows, X outcomes (the vocabulary, or a sparse signal's K tokens and its tail).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.objectives.terms import Term

NUCLEUS_GUESS = 1024
"""On a CPU, a row's nucleus is first looked for among this many top tokens."""


@dataclass
class Pair:
    """Both distributions of a block of rows, and two buffers of the same shape.

    log p = score_p − lse_p. Most formulas use the scores, since it is cheaper to subtract a row's
    constant from a sum than from every element.
    """

    score_p_bX: Tensor
    lse_p_b: Tensor
    p_bX: Tensor
    score_q_bX: Tensor
    lse_q_b: Tensor
    q_bX: Tensor
    work_bX: Tensor
    more_bX: Tensor

    @classmethod
    def of_logs(
        cls, log_p_bX: Tensor, p_bX: Tensor, log_q_bX: Tensor, q_bX: Tensor, *buffers: Tensor
    ) -> Pair:
        """Build from log-probabilities, whose logsumexps are 0. buffers: `work` and `more`."""
        zero_b = torch.zeros_like(log_q_bX[:, 0])
        return cls(log_p_bX, zero_b, p_bX, log_q_bX, zero_b, q_bX, *buffers)

    def log_p(self) -> Tensor:
        """log p itself: normalizes the teacher's scores in place."""
        self.score_p_bX.sub_(self.lse_p_b[:, None])
        self.lse_p_b = torch.zeros_like(self.lse_p_b)
        return self.score_p_bX

    def log_q(self) -> Tensor:
        """log q itself: normalizes the student's scores in place."""
        self.score_q_bX.sub_(self.lse_q_b[:, None])
        self.lse_q_b = torch.zeros_like(self.lse_q_b)
        return self.score_q_bX


Divergence = Callable[[Pair, Term, Tensor], Tensor]
"""(both distributions, term, buffer for h) → value of each row. h comes out divided by the term's
`gradient_factor`."""


def forward_kl(pair: Pair, term: Term, h_bX: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p log(p / q)."""
    torch.neg(pair.p_bX, out=h_bX)
    ratio_bX = torch.sub(pair.score_p_bX, pair.score_q_bX, out=pair.work_bX)
    return _expect(pair.p_bX, ratio_bX) - pair.lse_p_b + pair.lse_q_b


def reverse_kl(pair: Pair, term: Term, h_bX: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ q log(q / p)."""
    torch.sub(pair.score_q_bX, pair.score_p_bX, out=h_bX)
    return _expect(pair.q_bX, h_bX) - pair.lse_q_b + pair.lse_p_b


def jsd(pair: Pair, term: Term, h_bX: Tensor) -> Tensor:
    """β KL(p ‖ M) + (1 − β) KL(q ‖ M), M = βp + (1 − β)q (Lin 1991; Agarwal et al. 2024).

    Goes to 0 as β goes to 0 or 1; it does not become a KL divergence there.
    """
    beta = term.parameters["beta"]
    if beta in (0.0, 1.0):
        return h_bX.zero_().sum(-1)
    log_m_bX = _mixture(pair, beta).log_()
    # Not from q's scores: log(q / M) is bounded, while a score can be in the hundreds, and its
    # rounding error would survive in the gradient, which is a difference.
    torch.sub(pair.log_q(), log_m_bX, out=h_bX)
    of_student_b = _expect(pair.q_bX, h_bX)
    ratio_bX = torch.sub(pair.score_p_bX, log_m_bX, out=log_m_bX)
    of_teacher_b = _expect(pair.p_bX, ratio_bX) - pair.lse_p_b
    return of_teacher_b.mul_(beta).add_(of_student_b, alpha=1.0 - beta)


def normalized_jsd(pair: Pair, term: Term, h_bX: Tensor) -> Tensor:
    """jsd / (β (1 − β)): KL(p ‖ q) at β = 0, KL(q ‖ p) at β = 1, continuous in between."""
    beta = term.parameters["beta"]
    if beta == 0.0:
        return forward_kl(pair, term, h_bX)
    if beta == 1.0:
        return reverse_kl(pair, term, h_bX)
    return jsd(pair, term, h_bX).div_(beta * (1.0 - beta))


def skew_forward_kl(pair: Pair, term: Term, h_bX: Tensor) -> Tensor:
    """KL(p ‖ M), M = αp + (1 − α)q (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""
    alpha = term.parameters["alpha"]
    if alpha == 0.0:
        return forward_kl(pair, term, h_bX)
    mixture_bX = _mixture(pair, alpha)
    torch.mul(pair.p_bX, pair.q_bX, out=h_bX).div_(mixture_bX).mul_(alpha - 1.0)
    ratio_bX = torch.sub(pair.score_p_bX, mixture_bX.log_(), out=mixture_bX)
    return _expect(pair.p_bX, ratio_bX) - pair.lse_p_b


def skew_reverse_kl(pair: Pair, term: Term, h_bX: Tensor) -> Tensor:
    """KL(q ‖ M), M = (1 − α)p + αq (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""
    alpha = term.parameters["alpha"]
    if alpha == 0.0:
        return reverse_kl(pair, term, h_bX)
    mixture_bX = _mixture(pair, 1.0 - alpha)
    share_bX = torch.div(pair.q_bX, mixture_bX, out=pair.more_bX).mul_(alpha)
    torch.sub(pair.log_q(), mixture_bX.log_(), out=h_bX)
    value_b = _expect(pair.q_bX, h_bX)
    h_bX.sub_(share_bX.mul_(pair.q_bX))
    return value_b


def total_variation(pair: Pair, term: Term, h_bX: Tensor) -> Tensor:
    """½ Σ |p − q|."""
    gap_bX = torch.sub(pair.q_bX, pair.p_bX, out=pair.work_bX)
    torch.sign(gap_bX, out=h_bX).mul_(pair.q_bX).mul_(0.5)
    return gap_bX.abs_().sum(-1).mul_(0.5)


def alpha_beta(pair: Pair, term: Term, h_bX: Tensor) -> Tensor:
    """The α-β divergence (Cichocki et al. 2011; ABKD, Wang et al. 2025, arXiv 2505.04560).

    −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)], and its limits at α = 0 or β = 0.
    (1, 0) is KL(p ‖ q), (0, 1) is KL(q ‖ p).
    """
    alpha, beta = (term.parameters[name] for name in ("alpha", "beta"))
    log_p_bX, log_q_bX = pair.log_p(), pair.log_q()
    if alpha == 0.0:  # (q^β log(q^β / p^β) − q^β + p^β) / β²
        power_bX = torch.mul(log_q_bX, beta, out=pair.work_bX).exp_()
        torch.sub(log_q_bX, log_p_bX, out=h_bX).mul_(power_bX)
        other_bX = torch.mul(log_p_bX, beta, out=pair.more_bX).exp_()
        return (h_bX.sum(-1) * beta + other_bX.sum(-1) - power_bX.sum(-1)) / beta**2
    student_bX = torch.mul(log_q_bX, alpha + beta, out=h_bX).exp_()
    teacher_bX = torch.mul(log_p_bX, alpha + beta, out=pair.work_bX).exp_()
    student_b, teacher_b = student_bX.sum(-1), teacher_bX.sum(-1)
    if beta == 0.0:  # (p^α log(p^α / q^α) − p^α + q^α) / α²
        h_bX.sub_(teacher_bX).div_(alpha)
        log_ratio_bX = torch.sub(log_p_bX, log_q_bX, out=pair.more_bX)
        cross_b = _expect(teacher_bX, log_ratio_bX)
        return (cross_b * alpha - teacher_b + student_b) / alpha**2
    cross_bX = torch.mul(log_p_bX, alpha, out=pair.work_bX)
    cross_bX.add_(log_q_bX, alpha=beta).exp_()
    h_bX.sub_(cross_bX).div_(alpha)
    mean_b = (alpha * teacher_b + beta * student_b) / (alpha + beta)
    return (mean_b - cross_bX.sum(-1)) / (alpha * beta)


def adaptive_kl(pair: Pair, term: Term, h_bX: Tensor) -> Tensor:
    """AKL (Wu et al. 2024, arXiv 2404.02657): forward KL to the extent that q is wrong on the
    head of p, reverse KL for the rest.

    The head is the smallest set of most likely tokens with a mass of at least μ. Forward and
    reverse KL are weighted by the shares of Σ|p − q| inside and outside the head. The gradient
    treats these weights as constants.
    """
    threshold_b1 = _nucleus_threshold(pair.p_bX, term.parameters["mu"])
    gap_bX = torch.sub(pair.p_bX, pair.q_bX, out=pair.work_bX).abs_()
    everywhere_b = gap_bX.sum(-1)
    head_b = gap_bX.mul_(pair.p_bX >= threshold_b1).sum(-1)
    tiny = torch.finfo(gap_bX.dtype).tiny
    of_head_b = (head_b / everywhere_b.clamp_min(tiny)).clamp_(max=1.0)
    reverse_b = reverse_kl(pair, term, h_bX)
    h_bX.mul_((1.0 - of_head_b)[:, None])
    forward_b = forward_kl(pair, term, pair.more_bX)
    h_bX.add_(pair.more_bX.mul_(of_head_b[:, None]))
    return of_head_b * forward_b + (1.0 - of_head_b) * reverse_b


DIVERGENCES: dict[str, Divergence] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        jsd,
        normalized_jsd,
        skew_forward_kl,
        skew_reverse_kl,
        total_variation,
        alpha_beta,
        adaptive_kl,
    )
}
"""Divergences from a teacher's distribution; cross_entropy compares with the data instead."""


def _mixture(pair: Pair, of_teacher: float) -> Tensor:
    """of_teacher · p + (1 − of_teacher) · q, never 0.

    If both underflow, 0 is replaced by the smallest normal number: its logarithm is multiplied by
    0, and log 0 would turn that into NaN.
    """
    mixture_bX = torch.lerp(pair.q_bX, pair.p_bX, of_teacher, out=pair.work_bX)
    return mixture_bX.clamp_(min=torch.finfo(mixture_bX.dtype).tiny)


def _expect(weights_bX: Tensor, values_bX: Tensor) -> Tensor:
    """Σ weights · values of each row; overwrites `values` with the summands."""
    return values_bX.mul_(weights_bX).sum(-1)


def _nucleus_threshold(p_bX: Tensor, mass: float) -> Tensor:
    """The smallest probability in each row's nucleus (its smallest set of tokens that holds
    `mass`)."""
    sorted_bG = _top_probabilities(p_bX, mass)
    inside_bG = sorted_bG.cumsum(-1) - sorted_bG < mass
    inside_bG[:, 0] = True
    last_b1 = inside_bG.sum(-1, keepdim=True) - 1
    return sorted_bG.gather(1, last_b1)


def _top_probabilities(p_bX: Tensor, mass: float) -> Tensor:
    """Enough of each row's largest probabilities to hold `mass`, in descending order."""
    if p_bX.device.type == "cpu" and p_bX.shape[1] > NUCLEUS_GUESS:
        top_bG = p_bX.topk(NUCLEUS_GUESS, dim=-1).values
        if bool((top_bG.sum(-1) >= mass).all()):
            return top_bG
    return p_bX.sort(dim=-1, descending=True).values
