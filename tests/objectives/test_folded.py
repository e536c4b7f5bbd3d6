"""A teacher with a different vocabulary is compared over the roots that both vocabularies share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import DenseSignal, Fold, FoldedSignal, SparseSignal
from tests.objectives import reference
from tests.objectives.cases import Case, assert_near, assert_same_as_reference, make_case

DIVERGENCES = {
    "forward_kl": Term("forward_kl"),
    "reverse_kl": Term("reverse_kl"),
    "jsd": Term("jsd", beta=0.3),
    "normalized_jsd": Term("normalized_jsd", beta=0.3),
    "skew_forward_kl": Term("skew_forward_kl", alpha=0.2),
    "skew_reverse_kl": Term("skew_reverse_kl", alpha=0.2),
    "total_variation": Term("total_variation"),
    "alpha_beta": Term("alpha_beta", alpha=0.5, beta=0.5),
    "adaptive_kl": Term("adaptive_kl"),
}
ROOTS = 7


def roots_of(tokens: int, roots: int, g: torch.Generator) -> Tensor:
    """A random root for each token; every root has a token."""
    extra = torch.randint(0, roots, (tokens - roots,), generator=g)
    return torch.cat([torch.arange(roots), extra])[torch.randperm(tokens, generator=g)]


def folded(case: Case, roots: int = ROOTS, teacher_tokens: int = 19, seed: int = 0) -> Case:
    """The case with a teacher that has a different vocabulary and covers two of three rows."""
    g = torch.Generator().manual_seed(seed)
    assert isinstance(case.signal, DenseSignal)
    dense = case.signal
    width = dense.hidden_ND.shape[1]
    weight = torch.randn(teacher_tokens, width, generator=g, dtype=dense.hidden_ND.dtype)
    tokens = len(dense.head.weight_VD)
    fold = Fold(roots_of(tokens, roots, g), roots_of(teacher_tokens, roots, g), roots)
    covered_N = torch.arange(len(dense.hidden_ND)) % 3 != 1
    teacher = DenseSignal(dense.hidden_ND, replace(dense.head, weight_VD=weight, bias_V=None))
    return replace(case, signal=FoldedSignal(teacher, fold, covered_N))


def over_roots(case: Case, k: int) -> Case:
    """The same teacher, as the k most probable roots of each row and a tail."""
    assert isinstance(case.signal, FoldedSignal)
    fold, dense = case.signal.fold, case.signal.signal
    assert isinstance(dense, DenseSignal)
    rows = []
    for hidden_D in dense.hidden_ND:
        log_p_W = reference.logits(hidden_D, dense.head, len(fold.teacher_W)).log_softmax(0)
        rows.append(reference.log_of_roots(log_p_W, fold.teacher_W, fold.roots))
    top = torch.stack(rows).topk(k)
    tail_N = (1 - top.values.exp().sum(1)).clamp(0, 1)
    signal = replace(case.signal, signal=SparseSignal(top.indices, top.values, tail_N))
    return replace(case, signal=signal)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_agrees_with_the_reference(name: str) -> None:
    assert_same_as_reference(folded(make_case()), [DIVERGENCES[name]])


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_stored_roots_agree_with_the_reference(name: str) -> None:
    assert_same_as_reference(over_roots(folded(make_case()), k=3), [DIVERGENCES[name]])


def test_terms_at_several_temperatures_and_cross_entropy_agree_with_the_reference() -> None:
    terms = [
        Term("forward_kl", 0.7, 2.0),
        Term("reverse_kl", 0.2),
        Term("jsd", 0.3),
        Term("cross_entropy", 0.4),
    ]
    assert_same_as_reference(folded(make_case(softcap=3.0, scale=0.5)), terms)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 7),
    roots=st.integers(1, 9),
    more=st.tuples(st.integers(0, 8), st.integers(0, 20)),
    chunk_rows=st.integers(1, 8),
    bias=st.booleans(),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_agrees_for_any_vocabularies(
    rows: int,
    roots: int,
    more: tuple[int, int],
    chunk_rows: int,
    bias: bool,
    padding: int,
    seed: int,
) -> None:
    case = make_case(rows, roots + more[0], bias=bias, padding=padding, seed=seed)
    case = folded(case, roots, roots + more[1], seed)
    assert_same_as_reference(
        case, [Term("forward_kl"), Term("cross_entropy", 0.5)], chunk_rows=chunk_rows
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_with_equal_tokenizers_the_loss_is_that_of_a_dense_signal(name: str) -> None:
    case = make_case()
    assert isinstance(case.signal, DenseSignal)
    tokens = len(case.signal.head.weight_VD)
    permuted = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    fold = Fold(permuted, permuted, tokens)
    every = torch.ones(len(case.hidden_ND), dtype=torch.bool)
    same = replace(case, signal=FoldedSignal(case.signal, fold, every))
    usual, found = (
        fused_loss(each.hidden_ND, each.head, [DIVERGENCES[name]], signal=each.signal)
        for each in (case, same)
    )
    assert_near(found.total, usual.total, 1e-10)
    for ours, expected in zip(
        torch.autograd.grad(found.total, case.leaves),
        torch.autograd.grad(usual.total, case.leaves),
        strict=True,
    ):
        assert_near(ours, expected, 1e-10)


def test_permuted_teacher_ids_change_nothing() -> None:
    case = folded(make_case())
    assert isinstance(case.signal, FoldedSignal)
    dense, fold = case.signal.signal, case.signal.fold
    assert isinstance(dense, DenseSignal)
    order = torch.randperm(len(fold.teacher_W), generator=torch.Generator().manual_seed(2))
    head = replace(dense.head, weight_VD=dense.head.weight_VD[order])
    signal = replace(
        case.signal,
        signal=replace(dense, head=head),
        fold=replace(fold, teacher_W=fold.teacher_W[order]),
    )
    losses = [
        fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=each).total
        for each in (case.signal, signal)
    ]
    assert_near(losses[1], losses[0], 1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_a_coarser_fold_has_no_larger_divergence(seed: int) -> None:
    """Data processing: merged events differ at most as much as the events themselves."""
    case = make_case(vocab=9, seed=seed)
    assert isinstance(case.signal, DenseSignal)
    g = torch.Generator().manual_seed(seed)
    fine = Fold(torch.arange(9), torch.arange(9), 9)
    merged_R = roots_of(9, 4, g)
    coarse = Fold(merged_R, merged_R, 4)
    every = torch.ones(len(case.hidden_ND), dtype=torch.bool)
    values = [
        fused_loss(
            case.hidden_ND,
            case.head,
            [Term("forward_kl")],
            signal=FoldedSignal(case.signal, fold, every),
        ).total
        for fold in (coarse, fine)
    ]
    assert 0 <= values[0].item() <= values[1].item() + 1e-12


def test_a_numeral_raises_the_probability_of_its_first_digit() -> None:
    """The teacher has a token 123, the student only digits; the token's probability goes to "1"."""
    student = {"0": 0, "1": 1, "2": 2, "3": 3}
    fold = Fold(torch.arange(4), torch.tensor([0, 1, 2, 3, student["1"]]), 4)
    hidden_ND = torch.zeros(1, 4, dtype=torch.float64)
    logits_W = torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0]], dtype=torch.float64)
    head = make_case(vocab=4, student_width=4).head
    head = replace(head, weight_VD=torch.eye(4, dtype=torch.float64).requires_grad_())
    hidden_ND.requires_grad_()
    teacher_head = replace(head, weight_VD=logits_W.T.contiguous())
    teacher = DenseSignal(torch.ones(1, 1, dtype=torch.float64), teacher_head)
    signal = FoldedSignal(teacher, fold, torch.tensor([True]))
    loss = fused_loss(hidden_ND, head, [Term("forward_kl")], signal=signal).total
    (gradient_ND,) = torch.autograd.grad(loss, [hidden_ND])
    assert gradient_ND[0].argmin() == student["1"]
    assert float(gradient_ND[0, student["1"]]) < -0.7


def test_gradients_pass_gradcheck_in_float64() -> None:
    case = folded(make_case(rows=3, vocab=8), roots=5)

    def loss(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        head = replace(case.head, weight_VD=weight_VD)
        return fused_loss(hidden_ND, head, [Term("forward_kl")], signal=case.signal).total

    assert torch.autograd.gradcheck(loss, (case.hidden_ND, case.head.weight_VD))


def test_bfloat16_is_near_the_reference() -> None:
    case = folded(make_case(rows=16, vocab=40, student_width=8), roots=20, teacher_tokens=60)
    expected = reference.loss(
        case.hidden_ND, case.head, [Term("forward_kl")], case.signal, case.targets_N
    )
    found = fused_loss(
        case.hidden_ND,
        case.head,
        [Term("forward_kl")],
        signal=case.signal,
        compute_dtype=torch.bfloat16,
    )
    assert_near(found.total, expected, 0.02)


def test_rows_that_are_not_covered_have_no_loss_and_no_gradient() -> None:
    case = folded(make_case())
    assert isinstance(case.signal, FoldedSignal)
    signal = replace(case.signal, covered_N=torch.zeros(len(case.hidden_ND), dtype=torch.bool))
    found = fused_loss(case.hidden_ND, case.head, [Term("reverse_kl")], signal=signal)
    assert found.total.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(found.total, case.leaves))


def wrong_student_map(signal: FoldedSignal) -> FoldedSignal:
    return replace(signal, fold=replace(signal.fold, student_V=signal.fold.student_V[:-1]))


def wrong_root(signal: FoldedSignal) -> FoldedSignal:
    return replace(signal, fold=replace(signal.fold, roots=ROOTS - 1))


def wrong_head(signal: FoldedSignal) -> FoldedSignal:
    longer_W = torch.cat([signal.fold.teacher_W, torch.tensor([0])])
    return replace(signal, fold=replace(signal.fold, teacher_W=longer_W))


def wrong_rows(signal: FoldedSignal) -> FoldedSignal:
    return replace(signal, covered_N=signal.covered_N[:-1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (wrong_student_map, "student_V has shape"),
        (wrong_root, "contains the id"),
        (wrong_head, "the teacher's head has only 19 rows"),
        (wrong_rows, "covered_N has 5 rows"),
    ],
)
def test_an_inconsistent_signal_is_rejected(
    wrong: Callable[[FoldedSignal], FoldedSignal], message: str
) -> None:
    case = folded(make_case())
    assert isinstance(case.signal, FoldedSignal)
    with pytest.raises(SignalError, match=message):
        fused_loss(
            case.hidden_ND,
            case.head,
            [Term("forward_kl")],
            signal=wrong(case.signal),
            vocab_size=len(case.head.weight_VD),
        )
