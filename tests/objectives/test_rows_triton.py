"""The GPU kernel agrees with PyTorch's operators, in Triton's interpreter on a CPU.

Triton comes with the CUDA builds of torch; `pip install triton` brings it to others.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton")

from stillhouse.objectives import Term, fused_loss
from stillhouse.objectives import block_losses as blocks
from stillhouse.objectives import triton_kernel as rows_triton
from stillhouse.objectives.triton_dispatch import KINDS
from stillhouse.signals import LogitsSignal
from tests.objectives.cases import Case, make_case, relative_error
from tests.objectives.test_divergences import VARIANTS, at, name

TERMS = [term for term in VARIANTS if term.divergence in KINDS]


def results(case: Case, terms: list[Term], *, grad: bool = True) -> list[torch.Tensor]:
    with torch.set_grad_enabled(grad):
        loss = fused_loss(
            case.hidden_ND, case.head, terms, signal=case.signal, targets_N=case.targets_N
        )
    found = [loss.total.detach(), *loss.terms.values()]
    return found + (list(torch.autograd.grad(loss.total, case.leaves)) if grad else [])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch):
    """Switches the kernel on, wherever the tensors are, and counts its launches."""
    launches = []
    run = rows_triton.run

    def counted(*args, **kwargs):
        launches.append(1)
        return run(*args, **kwargs)

    def switch_on() -> list[int]:
        monkeypatch.setattr(rows_triton, "run", counted)
        monkeypatch.setattr(rows_triton, "COLUMNS", 16)  # rows of 45 logits take three rounds
        monkeypatch.setattr(blocks, "runs_kernels", lambda device: True)
        return launches

    return switch_on


@pytest.mark.parametrize("data", [False, True], ids=["alone", "with the data"])
@pytest.mark.parametrize("term", TERMS, ids=name)
def test_values_and_gradients(term: Term, data: bool, kernel) -> None:
    case = make_case(rows=7, vocab=45, scale=1.5, dtype=torch.float32)
    terms = [at(term, 1.0, weight=0.7), *([Term("cross_entropy", weight=0.3)] if data else [])]
    expected = results(case, terms)
    launches = kernel()
    for found, wanted in zip(results(case, terms), expected, strict=True):
        if wanted.abs().max() > 1e-6:  # jsd at its ends is 0
            assert relative_error(found, wanted) < 1e-4
        else:
            assert found.abs().max() < 1e-6
    assert launches


@pytest.mark.parametrize("term", TERMS, ids=name)
def test_a_temperature_and_no_gradients(term: Term, kernel) -> None:
    case = make_case(rows=3, vocab=45, dtype=torch.float32)
    expected = results(case, [at(term, 2.0)], grad=False)
    kernel()
    for found, wanted in zip(results(case, [at(term, 2.0)], grad=False), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6)


def test_impossible_tokens_and_narrow_logits(kernel) -> None:
    """−∞ in a teacher's logits is probability 0; bfloat16 goes in and out."""
    case = make_case(rows=4, vocab=45, dtype=torch.float32)
    logits_NV = torch.randn(4, 45)
    logits_NV[:, 30:] = -torch.inf
    case = Case(case.hidden_ND, case.head, LogitsSignal(logits_NV), case.targets_N)
    expected = results(case, [Term("jsd")])
    kernel()
    for found, wanted in zip(results(case, [Term("jsd")]), expected, strict=True):
        assert relative_error(found, wanted) < 1e-4


def test_unsupported_cases_of_the_kernel_fall_back_to_pytorch(kernel) -> None:
    capped = make_case(softcap=3.0, dtype=torch.float32)
    with_bias = make_case(bias=True, dtype=torch.float32)
    plain = make_case(dtype=torch.float32)
    expected = [
        results(capped, [Term("jsd")]),
        results(with_bias, [Term("jsd")]),
        results(plain, [Term("adaptive_kl")]),
        results(plain, [Term("forward_kl"), Term("reverse_kl")]),
    ]
    launches = kernel()
    found = [
        results(capped, [Term("jsd")]),
        results(with_bias, [Term("jsd")]),
        results(plain, [Term("adaptive_kl")]),
        results(plain, [Term("forward_kl"), Term("reverse_kl")]),
    ]
    assert not launches
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stillhouse.objectives import triton_kernel as rows_triton
from stillhouse.objectives.triton_dispatch import KINDS

names = rows_triton._row.arg_names
pointers = dict(student="*bf16", teacher="*bf16", values="*fp32", cross="*fp32")
for kind in KINDS:
    if kind == "normalized_jsd":
        continue
    for data in (False, True):
        signature = {
            **pointers, "targets": "*i64" if data else "*fp32",
            "student_stride": "i64", "teacher_stride": "i64", "vocabulary": "i32",
            "student_scale": "fp32", "teacher_scale": "fp32", "coefficient": "fp32",
            "of_data": "fp32", "parameter": "fp32",
        }
        constants = dict(KIND=kind, DATA=data, GRAD=True, COLUMNS=4096)
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=rows_triton._row, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert made.asm["cubin"]
print("compiled")
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu() -> None:
    """To machine code for compute capability 9.0, which needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
