"""The compared losses: Stillhouse, other libraries (if installed), and plain PyTorch.

Each returns the mean over a Problem's supervised rows of generalized JSD with the mixture
βp + (1 − β)q, where β = 0 means forward KL and β = 1 reverse KL, as TRL and Liger define it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.objectives import Term, fused_loss
from stillhouse.objectives.products import accumulate_outer_, product_
from stillhouse.signals import DenseSignal, LMHead


@dataclass
class Problem:
    """Hidden states and heads of both models. A label of −100 masks a row."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    labels_N: Tensor
    beta: float = 0.5
    temperature: float = 1.0

    @cached_property
    def supervised(self) -> Tensor:
        """[S] Indices of the supervised rows. In training, the collator provides them."""
        return (self.labels_N != -100).nonzero()[:, 0]

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_ND, self.weight_VD

    @property
    def grads(self) -> list[Tensor]:
        """The gradients after `run`; zeros for leaves without a gradient."""
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in self.leaves]


Loss = Callable[[Problem], Tensor]


def make_problem(
    rows: int,
    vocab: int,
    width: int,
    *,
    masked: float = 0.25,
    beta: float = 0.5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Make random rows whose logits have a standard deviation of 2, for teacher and student."""
    g = torch.Generator(device).manual_seed(seed)
    made: dict[str, Any] = {"generator": g, "device": device}

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, **made) * scale).to(dtype)

    labels_N = torch.randint(0, vocab, (rows,), **made)
    labels_N[torch.randperm(rows, **made)[: round(rows * masked)]] = -100
    return Problem(
        random(rows, width).requires_grad_(),
        random(vocab, width, scale=2 / width**0.5).requires_grad_(),
        random(rows, width),
        random(vocab, width, scale=2 / width**0.5),
        labels_N,
        beta,
    )


def term_for(beta: float, temperature: float = 1.0) -> Term:
    """The term that equals TRL's and Liger's loss at this β."""
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    extra = {"beta": beta} if kind == "jsd" else {}
    return Term(kind, temperature=temperature, t_squared=False, **extra)


def stillhouse(problem: Problem) -> Tensor:
    rows_S = problem.supervised
    return fused_loss(
        problem.hidden_ND.index_select(0, rows_S),
        LMHead(problem.weight_VD),
        [term_for(problem.beta, problem.temperature)],
        signal=DenseSignal(problem.teacher_ND.index_select(0, rows_S), LMHead(problem.teacher_VD)),
        scale=1.0 / max(1, len(rows_S)),
    ).total


def divergence_of_logits(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> Tensor:
    """Divergence of each row, with torch's own kl_div and autograd."""
    log_q, log_p = F.log_softmax(student_NV, -1), F.log_softmax(teacher_NV, -1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    weight = torch.tensor([beta, 1 - beta], device=log_q.device).log()
    log_m = torch.logaddexp(log_p + weight[0], log_q + weight[1])
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def naive(problem: Problem) -> Tensor:
    """Computes the full logits of the supervised rows, in float32 after the head."""
    valid = problem.labels_N != -100
    student_NV = (problem.hidden_ND[valid] @ problem.weight_VD.T).float() / problem.temperature
    with torch.no_grad():
        teacher_NV = (problem.teacher_ND[valid] @ problem.teacher_VD.T).float()
        teacher_NV /= problem.temperature
    return divergence_of_logits(student_NV, teacher_NV, problem.beta).mean()


def trl_gkd(problem: Problem) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    student_NV = problem.hidden_ND @ problem.weight_VD.T
    with torch.no_grad():
        teacher_NV = problem.teacher_ND @ problem.teacher_VD.T
    return GKDTrainer.generalized_jsd_loss(
        student_NV[None],
        teacher_NV[None],
        labels=problem.labels_N[None],
        beta=problem.beta,
        temperature=problem.temperature,
        num_items_in_batch=(problem.labels_N != -100).sum(),
    )


def trl_chunked(problem: Problem) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    valid = problem.labels_N != -100
    return _chunked_divergence_loss(
        problem.hidden_ND[None],
        problem.teacher_ND[None],
        problem.weight_VD,
        problem.teacher_VD,
        valid[None].long(),
        problem.beta,
        num_items_in_batch=valid.sum(),
        temperature=problem.temperature,
    )[0]


def trl_chunked_packed(problem: Problem) -> Tensor:
    """TRL's loss on the supervised rows only (except on CUDA, it also projects masked rows)."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    valid = problem.labels_N != -100
    return _chunked_divergence_loss(
        problem.hidden_ND[valid][None],
        problem.teacher_ND[valid][None],
        problem.weight_VD,
        problem.teacher_VD,
        torch.ones_like(problem.labels_N[valid])[None],
        problem.beta,
        num_items_in_batch=valid.sum(),
        temperature=problem.temperature,
    )[0]


def liger(chunk_size: int, compiled: bool, packed: bool = False) -> Loss:
    def loss(problem: Problem) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=problem.beta,
            temperature=problem.temperature,
            compiled=compiled,
            chunk_size=chunk_size,
        )
        rows = problem.labels_N != -100 if packed else slice(None)
        return module(
            problem.hidden_ND[rows],
            problem.weight_VD,
            problem.teacher_ND[rows],
            problem.teacher_VD,
            problem.labels_N[rows],
        )

    return loss


def orda(problem: Problem) -> Tensor:
    import orda_kernel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return orda_kernel.distillation_loss(
            problem.hidden_ND,
            problem.weight_VD,
            problem.labels_N,
            orda_kernel.SeparateTeacher(hidden=problem.teacher_ND, weight=problem.teacher_VD),
            student_ce_weight=0.0,
            kl_weight=1.0,
            kl_temperature=problem.temperature,
        ).loss


def matmul_floor(problem: Problem, rows: int = 256) -> None:
    """Compute only the same four products over the supervised rows, in the same dtype, with the
    faster of PyTorch's libraries."""
    with torch.no_grad():
        valid = problem.labels_N != -100
        hidden_ND, teacher_ND = problem.hidden_ND[valid], problem.teacher_ND[valid]
        weight_VD = problem.weight_VD.detach()
        student_nV = hidden_ND.new_empty(rows, len(weight_VD))
        teacher_nV = torch.empty_like(student_nV)
        dhidden_ND, dweight_VD = torch.empty_like(hidden_ND), torch.empty_like(weight_VD)
        for start in range(0, len(hidden_ND), rows):
            hidden_nD = hidden_ND[start : start + rows]
            n = len(hidden_nD)
            product_(student_nV[:n], hidden_nD, weight_VD)
            product_(teacher_nV[:n], teacher_ND[start : start + rows], problem.teacher_VD)
            product_(dhidden_ND[start : start + rows], student_nV[:n], weight_VD.T)
            accumulate_outer_(dweight_VD, student_nV[:n], hidden_nD, 1.0, first=start == 0)


CONTENDERS: dict[str, Loss] = {
    "stillhouse": stillhouse,
    "naive": naive,
    "trl gkd": trl_gkd,
    "trl chunked": trl_chunked,
    "trl chunked, packed": trl_chunked_packed,
    "liger 128": liger(128, compiled=False),
    "liger 128, packed": liger(128, compiled=False, packed=True),
    "liger 1024": liger(1024, compiled=False),
    "liger 128, compiled": liger(128, compiled=True),
    "liger 1024, compiled": liger(1024, compiled=True),
    "orda": orda,
}
"""\"packed\" passes only the supervised rows, which the peer does not select by itself."""

MODULES = {"trl": "trl", "liger": "liger_kernel", "orda": "orda_kernel"}


def installed(name: str) -> bool:
    module = MODULES.get(name.split()[0])
    return module is None or importlib.util.find_spec(module) is not None


def defined(name: str, beta: float) -> bool:
    """Whether the loss supports β: orda's loss on hidden states has no JSD."""
    return name != "orda" or beta == 0.0


def run(loss: Loss, problem: Problem) -> Tensor:
    """Run forward and backward. The gradients are in the problem's leaves."""
    for leaf in problem.leaves:
        leaf.grad = None
    value = loss(problem)
    value.backward()
    return value.detach()


def quiet() -> contextlib.AbstractContextManager[None]:
    """Suppress libraries' warnings in the table of results."""
    return warnings.catch_warnings(action="ignore")
