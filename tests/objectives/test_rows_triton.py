"""The GPU kernels agree with PyTorch's operators, on a GPU or else in Triton's interpreter.

CUDA builds of torch include Triton; for other builds, `make test-triton` installs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton")

from stillhouse.objectives import Term, chunk_loop, fused_loss, triton_entries, triton_kernel
from stillhouse.objectives.triton_dispatch import KINDS, MOST_ENTRIES
from stillhouse.signals import LogitsSignal, SampledSignal, SparseSignal
from tests.objectives.cases import Case, make_case, placed, relative_error, with_signal
from tests.objectives.test_divergences import VARIANTS, at, name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.cuda] if DEVICE == "cuda" else []
TERMS = [term for term in VARIANTS if term.divergence in KINDS]
KL = Term("forward_kl")
STORED = ["sparse", "sampled", "frozen head"]
Kernels = Callable[[], list[str]]  # enables the kernels; returns the list of their launches
LAUNCHERS = {
    "dense_rows": triton_kernel,
    "sparse_rows": triton_entries,
    "counted_rows": triton_entries,
}


def results(case: Case, terms: list[Term], *, grad: bool = True, **more: Any) -> list[torch.Tensor]:
    case, more = placed(case, DEVICE), {key: placed(value, DEVICE) for key, value in more.items()}
    with torch.set_grad_enabled(grad):
        loss = fused_loss(
            case.hidden_ND, case.head, terms, signal=case.signal, targets_N=case.targets_N, **more
        )
    found = [loss.total.detach(), *loss.terms.values()]
    found += torch.autograd.grad(loss.total, case.leaves) if grad else []
    return [each.cpu() for each in found]


def assert_agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.abs().max() > 1e-6:  # jsd at its ends is 0
            assert relative_error(ours, theirs) < 1e-4
        else:
            assert ours.abs().max() < 1e-6


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Returns a function that enables the kernels and returns the list of their launches."""
    launches: list[str] = []
    monkeypatch.setattr(chunk_loop, "runs_kernels", lambda device: False)

    def recorded(module: ModuleType, launcher: str) -> None:
        run = getattr(module, launcher)

        def record(*args: Any, **kwargs: Any) -> Any:
            launches.append(launcher)
            return run(*args, **kwargs)

        monkeypatch.setattr(module, launcher, record)

    def switch_on() -> list[str]:
        for launcher, module in LAUNCHERS.items():
            recorded(module, launcher)
        monkeypatch.setattr(triton_kernel, "COLUMNS", 16)  # 45 logits take three rounds
        monkeypatch.setattr(chunk_loop, "runs_kernels", lambda device: True)
        return launches

    return switch_on


def compare(kernel: Kernels, case: Case, terms: list[Term], **more: Any) -> list[str]:
    expected = results(case, terms, **more)
    launches = kernel()
    assert_agree(results(case, terms, **more), expected)
    return launches


# --- a teacher's logits ----------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True], ids=["alone", "with the data"])
@pytest.mark.parametrize("term", TERMS, ids=name)
def test_values_and_gradients_agree_with_pytorch(term: Term, data: bool, kernel: Kernels) -> None:
    case = make_case(rows=7, vocab=45, scale=1.5, dtype=torch.float32)
    terms = [at(term, 1.0, weight=0.7), *([Term("cross_entropy", weight=0.3)] if data else [])]
    assert compare(kernel, case, terms) == ["dense_rows"]


@pytest.mark.parametrize("term", TERMS, ids=name)
def test_values_at_temperature_2_without_gradients(term: Term, kernel: Kernels) -> None:
    case = make_case(rows=3, vocab=45, dtype=torch.float32)
    assert compare(kernel, case, [at(term, 2.0)], grad=False) == ["dense_rows"]


@pytest.mark.parametrize("term", [Term("forward_kl"), Term("jsd")], ids=name)
def test_cross_entropy_at_temperature_1_with_a_divergence_at_2(term: Term, kernel: Kernels) -> None:
    case = make_case(rows=5, vocab=45, scale=1.5, dtype=torch.float32)
    terms = [at(term, 2.0), Term("cross_entropy", 0.1)]
    assert compare(kernel, case, terms) == ["dense_rows"]


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
def test_teacher_logits_of_minus_infinity_agree_with_pytorch(
    divergence: str, kernel: Kernels
) -> None:
    """A teacher's logit of −∞ is a probability of 0."""
    case = make_case(rows=4, vocab=45, dtype=torch.float32)
    logits_NV = torch.randn(45, 4).T  # the logits of a row are not contiguous
    logits_NV[:, 30:] = -torch.inf
    case = Case(case.hidden_ND, case.head, LogitsSignal(logits_NV), case.targets_N)
    assert compare(kernel, case, [Term(divergence)]) == ["dense_rows"]


def test_several_chunks_take_one_launch_each(kernel: Kernels) -> None:
    case = make_case(rows=10, vocab=45, dtype=torch.float32)
    assert compare(kernel, case, [Term("jsd")], chunk_rows=4) == ["dense_rows"] * 3


# --- stored signals, and cross-entropy alone -------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "data"), [(1.0, False), (1.0, True), (2.0, True)], ids=["T1", "data", "T2 data"]
)
@pytest.mark.parametrize(
    ("kind", "term"),
    [(kind, term) for kind in STORED for term in TERMS if kind == "sparse" or term == KL],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_values_and_gradients_on_stored_signals_agree_with_pytorch(
    term: Term, kind: str, temperature: float, data: bool, kernel: Kernels
) -> None:
    case = with_signal(make_case(7, 45, scale=1.5, dtype=torch.float32), kind, temperature, k=5)
    terms = [at(term, temperature, weight=0.7)]
    terms += [Term("cross_entropy", weight=0.3)] if data else []
    launched = "sparse_rows" if kind == "sparse" else "counted_rows"
    assert compare(kernel, case, terms) == [launched]


@pytest.mark.parametrize("kind", STORED)
def test_values_on_stored_signals_agree_with_pytorch(kind: str, kernel: Kernels) -> None:
    case = with_signal(make_case(7, 45, dtype=torch.float32), kind, 1.0, k=5)
    terms = [Term("forward_kl"), Term("cross_entropy", 0.5)]
    assert len(compare(kernel, case, terms, grad=False)) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_cross_entropy_alone_agrees_with_pytorch(grad: bool, kernel: Kernels) -> None:
    case = make_case(7, 45, scale=0.5, dtype=torch.float32)
    assert compare(kernel, case, [Term("cross_entropy", 0.3)], grad=grad) == ["counted_rows"]


@pytest.mark.parametrize("term", [Term("cross_entropy"), Term("forward_kl"), Term("jsd")], ids=name)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_padding_row_weights_and_a_scale_agree_with_pytorch(
    kind: str, term: Term, kernel: Kernels
) -> None:
    """Padding rows get neither probability nor gradient; 45 is not a multiple of COLUMNS."""
    case = with_signal(make_case(7, 45, padding=4, dtype=torch.float32), kind, k=5)
    weights_N = torch.linspace(0.0, 2.0, 7)  # the first row is ignored
    compare(kernel, case, [term], row_weights_N=weights_N, scale=0.1, vocab_size=45)
    grads = results(case, [term], row_weights_N=weights_N, vocab_size=45)[-2:]
    assert grads[0][0].abs().max() == 0
    assert grads[1][45:].abs().max() == 0


def test_short_rows_and_empty_tails_agree_with_pytorch(kernel: Kernels) -> None:
    """A short row is filled with its first token at −∞; a tail may be exactly 0."""
    case = with_signal(make_case(4, 45, dtype=torch.float32), "sparse", k=5)
    signal = case.signal
    assert isinstance(signal, SparseSignal)
    ids_NK, log_probs_NK, tail_N = signal.ids_NK, signal.log_probs_NK, signal.tail_N
    tail_N[0] += log_probs_NK[0, 2:].exp().sum()
    ids_NK[0, 2:] = ids_NK[0, 0]
    log_probs_NK[0, 2:] = -torch.inf
    log_probs_NK[1] -= torch.logsumexp(log_probs_NK[1], 0)
    tail_N[1] = 0
    case.targets_N[0] = ids_NK[0, 0]  # among the row's K tokens; the other targets are in a tail
    launches = compare(kernel, case, [Term("skew_reverse_kl"), Term("cross_entropy", 0.4)])
    assert launches == ["sparse_rows"]


def test_a_target_may_be_among_the_sampled_tokens(kernel: Kernels) -> None:
    case = with_signal(make_case(4, 45, dtype=torch.float32), "sampled", draws=30)
    signal = case.signal
    assert isinstance(signal, SampledSignal)
    assert (signal.ids_NK.sort(1).values.diff(dim=1) == 0).any()  # drawn twice
    case.targets_N.copy_(signal.ids_NK[:, 0])
    assert compare(kernel, case, [Term("forward_kl"), Term("cross_entropy", 0.4)])


@pytest.mark.parametrize("kind", ["dense", *STORED])
def test_kernels_read_and_write_bfloat16_logits(kind: str, kernel: Kernels) -> None:
    case = make_case(9, 45, 16, 24, dtype=torch.float32)
    for tensor in (case.hidden_ND, case.head.weight_VD):
        tensor.data.copy_(tensor.detach().bfloat16())
    case = with_signal(case, kind, k=5)
    expected = results(case, [KL])
    launches = kernel()
    found = results(case, [KL], compute_dtype=torch.bfloat16)
    assert launches
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 0.03


def test_unsupported_cases_fall_back_to_pytorch(kernel: Kernels) -> None:
    plain = make_case(dtype=torch.float32)
    everything = with_signal(plain, "sparse", k=13)
    long = with_signal(make_case(2, MOST_ENTRIES + 9, dtype=torch.float32), "sparse", k=1025)
    cases = [
        (make_case(softcap=3.0, dtype=torch.float32), [Term("jsd")]),
        (make_case(bias=True, dtype=torch.float32), [Term("cross_entropy")]),
        (make_case(dtype=torch.float64), [Term("jsd")]),
        (plain, [Term("adaptive_kl")]),
        (plain, [Term("forward_kl"), Term("reverse_kl")]),
        (with_signal(plain, "sparse"), [Term("alpha_beta")]),
        (everything, [Term("forward_kl")]),
        (long, [Term("forward_kl")]),
    ]
    expected = [results(case, terms) for case, terms in cases]
    launches = kernel()
    found = [results(case, terms) for case, terms in cases]
    assert not launches
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stillhouse.objectives import triton_entries, triton_kernel
from stillhouse.objectives.triton_dispatch import KINDS

TYPES = dict.fromkeys(["student", "teacher"], "*bf16") | dict.fromkeys(["ids"], "*i64")
TYPES |= dict.fromkeys(["entries", "vocabulary"], "i32")
TYPES |= dict.fromkeys(["student_stride", "teacher_stride"], "i64")

def type_of(name, data):
    if name == "targets":
        return "*i64" if data else "*fp32"
    scalar = name.endswith("scale") or name in ("teacher_floor", "coefficient", "of_data")
    return TYPES.get(name) or ("fp32" if scalar or name == "parameter" else "*fp32")

def compile(kernel, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: type_of(name, constants["DATA"]) for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert made.asm["cubin"]

for data, apart in ((False, False), (True, False), (True, True)):
    common = dict(DATA=data, APART=apart, GRAD=True, COLUMNS=4096)
    for places in (0, 64, 1024):
        compile(triton_entries._counted_row, PLACES=places, **common)
    for kind in KINDS:
        if kind == "normalized_jsd":
            continue
        compile(triton_kernel._dense_row, KIND=kind, **common)
        for buckets in (64, 2048) if kind == "forward_kl" else (64,):
            compile(triton_entries._sparse_row, KIND=kind, BUCKETS=buckets, **common)
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu() -> None:
    """Compiling to machine code for compute capability 9.0 needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
