"""Small random problems for the loss tests."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import (
    DenseSignal,
    FrozenHeadSignal,
    LMHead,
    LogitsSignal,
    SampledSignal,
    Signal,
    SparseSignal,
)
from tests.objectives import reference


@dataclass
class Case:
    """Random hidden states of a student, its LM head, a teacher's signal, and target tokens."""

    hidden_ND: Tensor
    head: LMHead
    signal: Signal
    targets_N: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        tensors = [self.hidden_ND, self.head.weight_VD, self.head.bias_V]
        return [t for t in tensors if t is not None and t.requires_grad]


def make_case(
    rows: int = 6,
    vocab: int = 13,
    student_width: int = 5,
    teacher_width: int = 7,
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    padding: int = 0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, grad: bool = False) -> Tensor:
        value = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        return value.requires_grad_(grad)

    head = LMHead(
        random(vocab + padding, student_width, grad=True),
        random(vocab + padding, grad=True) if bias else None,
        scale,
        softcap,
    )
    teacher_head = LMHead(
        random(vocab, teacher_width), random(vocab) if bias else None, scale, softcap
    )
    return Case(
        random(rows, student_width, grad=True),
        head,
        DenseSignal(random(rows, teacher_width), teacher_head),
        torch.randint(0, vocab, (rows,), generator=g),
    )


def placed(value: Any, device: str) -> Any:
    """Copies a tensor, or every tensor of a case, head, or signal, to a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: placed(getattr(value, f.name), device) for f in fields(value)}
        return replace(value, **changes)
    return value


def grad_of(leaf: Tensor) -> Tensor:
    """The gradient of a leaf tensor, which must have one."""
    assert leaf.grad is not None
    return leaf.grad


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found.to(expected.dtype) - expected).norm() / expected.norm())


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Asserts a relative error of at most `tolerance`, or float64's rounding of numbers near 1."""
    gap = float((found.detach().to(expected.dtype) - expected.detach()).norm())
    assert gap <= tolerance * float(expected.detach().norm()) + 1e-13


def assert_same_as_reference(
    case: Case, terms: list[Term], tolerance: float = 1e-10, **kwargs: Any
) -> None:
    row_weights_N = kwargs.get("row_weights_N")
    expected = reference.loss(
        case.hidden_ND,
        case.head,
        terms,
        case.signal,
        case.targets_N,
        row_weights_N,
        kwargs.get("vocab_size"),
    )
    found = fused_loss(
        case.hidden_ND, case.head, terms, signal=case.signal, targets_N=case.targets_N, **kwargs
    )
    assert_near(found.total, expected, tolerance)
    expected_grads = torch.autograd.grad(expected, case.leaves)
    found_grads = torch.autograd.grad(found.total, case.leaves)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        assert_near(found_grad, expected_grad, tolerance)


def with_signal(
    case: Case, kind: str, temperature: float = 1.0, k: int = 4, draws: int = 20
) -> Case:
    """The same case with the teacher's outputs in a different kind of signal."""
    assert isinstance(case.signal, DenseSignal)
    head = case.signal.head
    vocab = len(head.weight_VD)
    rows = [reference.logits(hidden_D, head, vocab) for hidden_D in case.signal.hidden_ND]
    logits_NV = torch.stack(rows) if rows else case.hidden_ND.new_empty(0, vocab)
    log_probs_NV = torch.log_softmax(logits_NV / temperature, -1)
    if kind == "dense":
        return case
    if kind == "logits":
        return replace(case, signal=LogitsSignal(logits_NV))
    if kind == "sparse":
        top = log_probs_NV.topk(min(k, vocab))
        tail_N = (1 - top.values.exp().sum(1)).clamp(0, 1) * (k < vocab)
        return replace(case, signal=SparseSignal(top.indices, top.values, tail_N, temperature))
    if kind == "frozen head":
        p_NV = log_probs_NV.exp()
        weight_VD = case.head.weight_VD.detach()[:vocab]
        vector_ND = case.head.scale * p_NV @ weight_VD
        negative_entropy_N = (p_NV * log_probs_NV).sum(1)
        frozen = replace(case.head, weight_VD=case.head.weight_VD.detach())
        signal = FrozenHeadSignal(vector_ND, negative_entropy_N, temperature)
        return replace(case, head=frozen, signal=signal)
    ids_NK = torch.multinomial(log_probs_NV.exp(), draws, replacement=True)
    counts_NK = torch.randint(0, 3, ids_NK.shape).to(logits_NV.dtype)
    counts_NK[:, 0] = 1
    return replace(case, signal=SampledSignal(ids_NK, counts_NK, temperature))
