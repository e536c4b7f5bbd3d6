"""The fused loss and its gradients agree with the token-by-token reference."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives import Term, fused_loss
from stillhouse.objectives.chunk_loop import NARROW_SUM_CHUNKS
from stillhouse.objectives.products import (
    TILE_ELEMENTS,
    ComputeHead,
    accumulate_outer_,
    product_,
)
from stillhouse.signals import DenseSignal, LMHead
from tests.objectives import reference
from tests.objectives.cases import (
    assert_near,
    assert_same_as_reference,
    grad_of,
    make_case,
    relative_error,
    with_signal,
)

MIXTURES = {
    "forward_kl": [Term("forward_kl")],
    "forward_kl at T=2": [Term("forward_kl", temperature=2.0)],
    "forward_kl at T=2 without T²": [Term("forward_kl", temperature=2.0, t_squared=False)],
    "cross_entropy": [Term("cross_entropy")],
    "both at one temperature": [Term("forward_kl", 0.7), Term("cross_entropy", 0.4)],
    "both at two temperatures": [Term("forward_kl", 0.7, 2.0), Term("cross_entropy", 0.4)],
    "forward_kl at three": [Term("forward_kl", 0.5, t) for t in (0.5, 1.0, 4.0)],
    "a weight of zero": [Term("forward_kl"), Term("cross_entropy", 0.0)],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_agrees_with_the_token_by_token_reference(name: str) -> None:
    assert_same_as_reference(make_case(), MIXTURES[name])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(2, 40),
    widths=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    chunk_rows=st.integers(1, 10),
    temperature=st.sampled_from([1.0, 2.0]),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 3.0]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_agrees_for_any_shape_and_head(
    rows: int,
    vocab: int,
    widths: tuple[int, int],
    chunk_rows: int,
    temperature: float,
    bias: bool,
    scale: float,
    softcap: float | None,
    padding: int,
    seed: int,
) -> None:
    case = make_case(
        rows,
        vocab,
        *widths,
        bias=bias,
        scale=scale,
        softcap=softcap,
        padding=padding,
        seed=seed,
    )
    terms = [Term("forward_kl", 0.9, temperature), Term("cross_entropy", 0.3)]
    assert_same_as_reference(case, terms, chunk_rows=chunk_rows)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(2, 40),
    width=st.integers(1, 8),
    chunk_rows=st.integers(1, 10),
    temperature=st.sampled_from([1.0, 2.0]),
    scale=st.sampled_from([1.0, 0.25]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_a_frozen_head_signal_is_the_dense_one(
    rows: int,
    vocab: int,
    width: int,
    chunk_rows: int,
    temperature: float,
    scale: float,
    padding: int,
    seed: int,
) -> None:
    dense = make_case(rows, vocab, width, 5, scale=scale, padding=padding, seed=seed)
    frozen = with_signal(dense, "frozen head", temperature)
    terms = [Term("forward_kl", 0.9, temperature), Term("cross_entropy", 0.3)]
    row_weights_N = torch.linspace(0.5, 2.0, rows, dtype=torch.float64)
    losses = [
        fused_loss(
            case.hidden_ND,
            case.head,
            terms,
            signal=case.signal,
            targets_N=case.targets_N,
            row_weights_N=row_weights_N,
            vocab_size=vocab,
            chunk_rows=chunk_rows,
        )
        for case in (frozen, dense)
    ]
    assert_near(losses[0].total, losses[1].total, 1e-10)
    assert_near(losses[0].terms["forward_kl"], losses[1].terms["forward_kl"], 1e-10)
    found, expected = (torch.autograd.grad(loss.total, dense.hidden_ND)[0] for loss in losses)
    assert_near(found, expected, 1e-10)


def test_a_frozen_head_signal_rejects_a_head_that_is_trained() -> None:
    case = make_case()
    signal = with_signal(case, "frozen head").signal
    with pytest.raises(SignalError, match="this head is being trained"):
        fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=signal)


def test_a_vocabulary_of_one_token_has_no_loss_and_no_gradient() -> None:
    case = make_case(vocab=1)
    found = fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=case.signal)
    assert abs(found.total.item()) < 1e-14
    assert torch.autograd.grad(found.total, case.hidden_ND)[0].abs().max() == 0.0


def test_row_weights_scale_and_vocab_size_are_applied() -> None:
    weights_N = torch.tensor([1.0, 0.0, 2.5, 0.5, 0.0, 3.0], dtype=torch.float64)
    case = make_case(vocab=13, bias=True)
    case.targets_N.clamp_(max=9)
    terms = MIXTURES["both at two temperatures"]
    assert_same_as_reference(case, terms, row_weights_N=weights_N, vocab_size=10, chunk_rows=4)

    plain = fused_loss(
        case.hidden_ND, case.head, terms, signal=case.signal, targets_N=case.targets_N
    )
    for scale in (0.125, torch.tensor(0.125, dtype=torch.float64)):
        scaled = fused_loss(
            case.hidden_ND,
            case.head,
            terms,
            signal=case.signal,
            targets_N=case.targets_N,
            scale=scale,
        )
        assert torch.allclose(scaled.total, plain.total * 0.125)
        assert torch.equal(scaled.terms["forward_kl"], plain.terms["forward_kl"])
        expected = torch.autograd.grad(plain.total, case.leaves, retain_graph=True)
        found = torch.autograd.grad(scaled.total, case.leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b * 0.125)


def test_terms_are_reported_unweighted_and_the_total_is_their_weighted_sum() -> None:
    case = make_case()
    terms = [Term("forward_kl", 0.7), Term("forward_kl", 0.2, 2.0), Term("cross_entropy", 0.4)]
    found = fused_loss(
        case.hidden_ND, case.head, terms, signal=case.signal, targets_N=case.targets_N
    )
    assert list(found.terms) == ["forward_kl@T1", "forward_kl@T2", "cross_entropy"]
    weights = [term.weight for term in terms]
    weighted = [w * v for w, v in zip(weights, found.terms.values(), strict=True)]
    assert torch.allclose(found.total, torch.stack(weighted).sum())
    assert not any(value.requires_grad for value in found.terms.values())
    assert found.rows == 6


def test_chunk_size_does_not_change_the_result() -> None:
    case = make_case(rows=9)
    results = []
    for chunk_rows in (1, 2, 4, 9, 100, None):
        loss = fused_loss(
            case.hidden_ND,
            case.head,
            [Term("forward_kl")],
            signal=case.signal,
            chunk_rows=chunk_rows,
        )
        results.append([loss.total.detach(), *torch.autograd.grad(loss.total, case.leaves)])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(cuts=st.sets(st.integers(0, 8)), seed=st.integers(0, 100))
def test_any_partition_of_the_rows_gives_the_same_gradient(cuts: set[int], seed: int) -> None:
    """Batches, accumulation steps and ranks are partitions: the sum is divided once, globally."""
    case = make_case(rows=8, seed=seed)
    terms = MIXTURES["both at one temperature"]

    def gradients(bounds: list[int]) -> list[Tensor]:
        for leaf in case.leaves:
            leaf.grad = None
        for low, high in itertools.pairwise(bounds):
            part = DenseSignal(case.signal.hidden_ND[low:high], case.signal.head)
            fused_loss(
                case.hidden_ND[low:high],
                case.head,
                terms,
                signal=part,
                targets_N=case.targets_N[low:high],
                scale=1 / 8,
            ).total.backward()
        return [grad_of(leaf) for leaf in case.leaves]

    whole = gradients([0, 8])
    for found, expected in zip(gradients([0, *sorted(cuts), 8]), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_no_rows_give_a_zero_loss_that_is_connected_to_every_parameter() -> None:
    case = make_case(rows=0, bias=True, padding=2)
    found = fused_loss(
        case.hidden_ND,
        case.head,
        MIXTURES["both at one temperature"],
        signal=case.signal,
        targets_N=case.targets_N,
    )
    found.total.backward()
    assert found.total.item() == 0.0
    assert found.rows == 0
    for leaf in case.leaves:
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.abs().sum() == 0.0


@pytest.mark.parametrize("rows", [1, 63])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_are_complete_beyond_one_tile_of_the_vocabulary(
    rows: int, dtype: torch.dtype
) -> None:
    vocab = 2 * (TILE_ELEMENTS // rows) + 1 if rows > 1 else 9000
    hidden_nD, weight_VD = torch.randn(rows, 8).to(dtype), torch.randn(vocab, 8).to(dtype)
    out_nV = torch.empty(rows, vocab, dtype=dtype)
    product_(out_nV, hidden_nD, weight_VD)
    expected_nV = hidden_nD.double() @ weight_VD.double().T
    assert relative_error(out_nV, expected_nV) < 2 * torch.finfo(dtype).eps


def test_the_gradient_of_a_frozen_head_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the head's gradient was computed")

    case = make_case()
    expected = torch.autograd.grad(
        fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=case.signal).total,
        case.hidden_ND,
    )[0]
    monkeypatch.setattr("stillhouse.objectives.chunk_loop.accumulate_outer_", fail)
    frozen = LMHead(case.head.weight_VD.detach())
    loss = fused_loss(case.hidden_ND, frozen, [Term("forward_kl")], signal=case.signal)
    torch.testing.assert_close(torch.autograd.grad(loss.total, case.hidden_ND)[0], expected)


def test_without_grad_only_the_value_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    expected = fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=case.signal)

    def fail(*_: object) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr("stillhouse.objectives.chunk_loop.Work._carry_back", fail)
    with torch.no_grad():
        found = fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=case.signal)
    assert not found.total.requires_grad
    assert torch.equal(found.total, expected.total)


def test_a_tied_head_accumulates_with_the_embedding() -> None:
    weight_VD = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    case = make_case(vocab=11, student_width=4)
    ids_N = torch.arange(6)
    head = LMHead(weight_VD)
    found = fused_loss(weight_VD[ids_N], head, [Term("forward_kl")], signal=case.signal).total
    expected = reference.loss(
        weight_VD[ids_N],
        head,
        [Term("forward_kl")],
        case.signal,
        case.targets_N,
    )
    torch.testing.assert_close(
        torch.autograd.grad(found, weight_VD), torch.autograd.grad(expected, weight_VD)
    )


def test_a_second_backward_through_one_graph_raises() -> None:
    case = make_case()
    loss = fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=case.signal).total * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_padding_rows_of_a_head_have_no_probability() -> None:
    """Qwen2.5's LM heads are padded to different sizes."""
    case = make_case(vocab=10, padding=4)
    with torch.no_grad():
        case.head.weight_VD[10:] = 50.0
    assert_same_as_reference(case, [Term("forward_kl")])
    found = fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=case.signal).total
    (weight_grad,) = torch.autograd.grad(found, case.head.weight_VD)
    assert weight_grad[10:].abs().max() == 0.0


# --- narrow dtypes -----------------------------------------------------------------------


def test_float32_is_within_rounding_of_float64() -> None:
    case = make_case(rows=40, vocab=300, student_width=16, teacher_width=24, dtype=torch.float32)
    assert_same_as_reference(case, MIXTURES["both at two temperatures"], tolerance=2e-6)


@pytest.mark.parametrize("rows", [1, 40])
def test_bfloat16_is_within_its_rounding(rows: int) -> None:
    """Products are rounded to 8 bits and sums are not: within 2% on gradients, 0.5% on the loss."""
    case = make_case(rows, vocab=300, student_width=16, teacher_width=24, dtype=torch.bfloat16)
    exact = make_case(rows, vocab=300, student_width=16, teacher_width=24)
    for wide, narrow in (
        (exact.hidden_ND, case.hidden_ND),
        (exact.head.weight_VD, case.head.weight_VD),
        (exact.signal.hidden_ND, case.signal.hidden_ND),
        (exact.signal.head.weight_VD, case.signal.head.weight_VD),
    ):
        wide.data.copy_(narrow)
    terms = [Term("forward_kl"), Term("cross_entropy", 0.5)]
    results = []
    for each in (case, exact):
        loss = fused_loss(
            each.hidden_ND,
            each.head,
            terms,
            signal=each.signal,
            targets_N=case.targets_N,
            chunk_rows=7,
        )
        results.append((loss.total, *torch.autograd.grad(loss.total, each.leaves)))
    (total, *grads), (exact_total, *exact_grads) = results
    assert total.dtype == torch.float32
    assert relative_error(total, exact_total) < 0.005
    for found, expected in zip(grads, exact_grads, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_gradient_of_many_chunks_is_summed_in_float32(dtype: torch.dtype) -> None:
    """A bfloat16 sum would lose many small contributions after a large one."""
    rows = 1025
    hidden_ND = torch.full((rows, 1), 2.0**-9, dtype=torch.bfloat16)
    hidden_ND[0] = 1.0
    head = LMHead(torch.zeros(2, 1, dtype=dtype, requires_grad=True))
    loss = fused_loss(
        hidden_ND,
        head,
        [Term("cross_entropy")],
        targets_N=torch.zeros(rows, dtype=torch.long),
        chunk_rows=1,
    )
    (grad,) = torch.autograd.grad(loss.total, head.weight_VD)
    assert grad.dtype == dtype
    assert grad[1, 0].item() == pytest.approx(0.5 * (1.0 + 1024 * 2.0**-9))


def test_a_bfloat16_head_gradient_of_few_chunks_needs_no_float32_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the most chunks that are summed in bfloat16, it is within 1% of a float32 sum."""
    rows = NARROW_SUM_CHUNKS * 4
    case = make_case(rows, vocab=300, student_width=16, teacher_width=24, dtype=torch.bfloat16)
    sums = []

    def record(total_VD: Tensor, *rest: Any, **more: Any) -> None:
        sums.append(total_VD.dtype)
        accumulate_outer_(total_VD, *rest, **more)

    monkeypatch.setattr("stillhouse.objectives.chunk_loop.accumulate_outer_", record)

    def gradient(weight_VD: Tensor) -> Tensor:
        head = replace(case.head, weight_VD=weight_VD)
        terms = [Term("forward_kl")]
        loss = fused_loss(
            case.hidden_ND.detach(), head, terms, signal=case.signal, chunk_rows=4,
            compute_dtype=torch.bfloat16,
        )  # fmt: skip
        return torch.autograd.grad(loss.total, weight_VD)[0]

    narrow_VD = gradient(case.head.weight_VD)
    wide_VD = gradient(case.head.weight_VD.detach().float().requires_grad_())
    chunks = [torch.bfloat16] * NARROW_SUM_CHUNKS, [torch.float32] * NARROW_SUM_CHUNKS
    assert sums == [*chunks[0], *chunks[1]]
    assert relative_error(narrow_VD, wide_VD) < 0.01


@pytest.mark.parametrize("rows", [1, 6, 7, 20])
def test_in_bfloat16_teacher_logits_are_computed_for_half_a_chunk_at_a_time(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(rows, vocab=30, dtype=torch.bfloat16)
    whole = fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=case.signal)
    products = []
    raw_logits = ComputeHead.raw_logits

    def record(head: ComputeHead, hidden_nD: Tensor, out_nV: Tensor) -> None:
        products.append((head.weight_VD.shape[1], len(hidden_nD)))
        raw_logits(head, hidden_nD, out_nV)

    monkeypatch.setattr(ComputeHead, "raw_logits", record)
    found = fused_loss(
        case.hidden_ND, case.head, [Term("forward_kl")], signal=case.signal, chunk_rows=6
    )
    student, teacher = case.hidden_ND.shape[1], case.signal.hidden_ND.shape[1]
    assert student != teacher
    sizes = {
        width: [size for each, size in products if each == width] for width in (student, teacher)
    }
    assert sum(sizes[student]) == sum(sizes[teacher]) == rows
    assert max(sizes[student]) == min(rows, 6)
    assert max(sizes[teacher]) == min(rows, 6) - min(rows, 6) // 2
    assert relative_error(found.total, whole.total) < 1e-3


def test_logsumexp_is_computed_in_float32() -> None:
    """In bfloat16, it would be wrong by up to 0.06 nats; only the logits are rounded."""
    logits_NV = (torch.randn(8, 5000) * 3).bfloat16()
    loss = fused_loss(
        torch.eye(8, dtype=torch.bfloat16),
        LMHead(logits_NV.T.contiguous()),
        [Term("cross_entropy")],
        targets_N=torch.arange(8),
    )
    expected = torch.nn.functional.cross_entropy(
        logits_NV.double(), torch.arange(8), reduction="sum"
    )
    assert relative_error(loss.total, expected) < 1e-6


def test_autocast_multiplies_in_its_dtype_and_returns_the_parameters_dtype() -> None:
    case = make_case(rows=20, vocab=50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_loss(case.hidden_ND, case.head, [Term("forward_kl")], signal=case.signal)
    explicit = fused_loss(
        case.hidden_ND,
        case.head,
        [Term("forward_kl")],
        signal=case.signal,
        compute_dtype=torch.bfloat16,
    )
    assert torch.equal(loss.total, explicit.total)
    for grad in torch.autograd.grad(loss.total, case.leaves):
        assert grad.dtype == torch.float32


def test_extreme_logits_stay_finite() -> None:
    """Probabilities that underflow on either side are 0, not NaN."""
    case = make_case(dtype=torch.float32)
    with torch.no_grad():
        case.head.weight_VD.mul_(1e3)
        case.signal.head.weight_VD.mul_(-1e3)
    terms = [Term("forward_kl"), Term("cross_entropy")]
    loss = fused_loss(
        case.hidden_ND, case.head, terms, signal=case.signal, targets_N=case.targets_N
    )
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(grad_of(leaf)).all() for leaf in case.leaves)
