"""The loss on a GPU has the CPU's values and gradients, and the host never waits for the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import DenseSignal, LMHead
from tests.objectives.cases import Case, make_case, relative_error
from tests.objectives.test_divergences import VARIANTS, name

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}


def moved(case: Case, dtype: torch.dtype) -> Case:
    def to(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cuda", dtype)

    return Case(
        to(case.hidden_ND).requires_grad_(),
        LMHead(to(case.head.weight_VD).requires_grad_()),
        DenseSignal(to(case.signal.hidden_ND), LMHead(to(case.signal.head.weight_VD))),
        case.targets_N.cuda(),
    )


def results(case: Case, term: Term, **settings: Any) -> list[Tensor]:
    loss = fused_loss(
        case.hidden_ND,
        case.head,
        [term],
        signal=case.signal,
        targets_N=case.targets_N,
        **settings,
    ).total
    return [loss.detach(), *torch.autograd.grad(loss, case.leaves)]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("term", [t for t in VARIANTS if t.divergence != "adaptive_kl"], ids=name)
def test_agrees_with_the_cpu(term: Term, dtype: torch.dtype) -> None:
    case = make_case(rows=40, vocab=96, student_width=16, teacher_width=24)
    for tensor in (case.hidden_ND, case.head.weight_VD, case.signal.hidden_ND):
        tensor.data.copy_(tensor.detach().bfloat16())  # so that rounding the copy changes nothing
    case.signal.head.weight_VD.copy_(case.signal.head.weight_VD.bfloat16())
    expected = results(case, term)
    found = results(moved(case, dtype), term, chunk_rows=16)
    for a, b in zip(found, expected, strict=True):
        if b.abs().max() > 1e-12:  # jsd at its ends is 0
            assert relative_error(a.cpu(), b) < BOUNDS[dtype]


def test_the_head_gradient_is_complete_beyond_one_block_of_the_vocabulary() -> None:
    case = make_case(rows=8, vocab=70_000, student_width=16, teacher_width=8)
    expected = results(case, Term("forward_kl"))
    found = results(moved(case, torch.bfloat16), Term("forward_kl"), chunk_rows=4)
    assert relative_error(found[2].cpu(), expected[2]) < BOUNDS[torch.bfloat16]


def test_peak_memory_is_a_float32_head_gradient_and_two_chunks_of_logits() -> None:
    case = moved(make_case(rows=64, vocab=70_000, student_width=256), torch.bfloat16)
    head = case.head.weight_VD
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = fused_loss(case.hidden_ND, case.head, [Term("cross_entropy")], targets_N=case.targets_N)
    peak = torch.cuda.max_memory_allocated() - before
    logits = 64 * 70_000 * 2
    assert loss.total.requires_grad
    assert peak < head.numel() * 4 + 2 * logits + (1 << 21)


def test_the_host_never_waits_for_the_gpu() -> None:
    case = moved(make_case(rows=40, vocab=96), torch.bfloat16)
    terms = [Term("forward_kl"), Term("jsd", 0.3, 2.0), Term("cross_entropy", 0.1)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = fused_loss(
            case.hidden_ND,
            case.head,
            terms,
            signal=case.signal,
            targets_N=case.targets_N,
            scale=torch.full((), 0.1, device="cuda"),
        )
        loss.total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
