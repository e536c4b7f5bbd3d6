"""Losses on the likelihoods of chunks of text that two tokenizers split into different tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives import Term, chunk_loss
from stillhouse.objectives.objective_names import ChunkDistance
from stillhouse.signals import ChunkSignal
from tests.objectives import reference
from tests.objectives.cases import Case, assert_near, make_case

DISTANCES: list[ChunkDistance] = ["binary", "squared"]


def slow(case: Case, signal: ChunkSignal, distance: str) -> Tensor:
    """The loss, one chunk at a time. A chunk's probability is the product of its tokens'."""
    total = case.hidden_ND.sum() * 0 + case.head.weight_VD.sum() * 0
    vocab = len(case.head.weight_VD)
    for chunk, log_p in enumerate(signal.log_probs_C):
        log_q = torch.zeros((), dtype=torch.float64)
        for row in signal.rows_P[signal.chunk_P == chunk].tolist():
            z_V = reference.logits(case.hidden_ND[row], case.head, vocab)
            log_q = log_q + z_V.log_softmax(0)[case.targets_N[row]]
        if distance == "squared":
            total = total + (log_p - log_q) ** 2
            continue
        both = [torch.stack([each, torch.log1p(-each.exp())]) for each in (log_p, log_q)]
        total = total + reference.kl(*both)
    return total


def chunks_of(rows: int, count: int, seed: int = 0) -> ChunkSignal:
    """Random rows in random chunks; the first row is in no chunk."""
    g = torch.Generator().manual_seed(seed)
    rows_P = torch.arange(1, rows)
    chunk_P = torch.randint(0, count, (rows - 1,), generator=g).sort().values
    return ChunkSignal(rows_P, chunk_P, -3 * torch.rand(count, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("distance", DISTANCES)
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(2, 9),
    count=st.integers(1, 5),
    softcap=st.sampled_from([None, 3.0]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_agree_with_the_reference(
    distance: ChunkDistance, rows: int, count: int, softcap: float | None, bias: bool, seed: int
) -> None:
    case = make_case(rows, softcap=softcap, bias=bias, seed=seed)
    signal = chunks_of(rows, count, seed)
    present = torch.bincount(signal.chunk_P, minlength=count) > 0
    new_C = present.cumsum(0) - 1
    log_p_C = signal.log_probs_C[present] - 0.01
    signal = ChunkSignal(signal.rows_P, new_C[signal.chunk_P], log_p_C)
    expected = slow(case, signal, distance)
    found = chunk_loss(
        case.hidden_ND, case.head, signal, case.targets_N, distance=distance, weight=0.7
    )
    assert_near(found.total, expected * 0.7, 1e-10)
    assert_near(found.terms[f"chunks {distance}"], expected, 1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(found.total, case.leaves),
        torch.autograd.grad(expected * 0.7, case.leaves),
        strict=True,
    ):
        assert_near(ours, theirs, 1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_pass_gradcheck_in_float64(distance: ChunkDistance) -> None:
    case, signal = make_case(rows=5, vocab=7), chunks_of(5, 2)

    def loss(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        head = replace(case.head, weight_VD=weight_VD)
        return chunk_loss(hidden_ND, head, signal, case.targets_N, distance=distance).total

    assert torch.autograd.gradcheck(loss, (case.hidden_ND, case.head.weight_VD))


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_likelihoods_have_no_loss_and_no_gradient(distance: ChunkDistance) -> None:
    case, signal = make_case(rows=5), chunks_of(5, 1)
    log_q = -torch.stack(
        [
            reference.token_value(
                Term("cross_entropy"),
                reference.logits(case.hidden_ND[n], case.head, len(case.head.weight_VD)),
                None,
                n,
                int(case.targets_N[n]),
                0,
            )
            for n in range(1, 5)
        ]
    ).sum()
    signal = replace(signal, log_probs_C=log_q.detach()[None])
    found = chunk_loss(case.hidden_ND, case.head, signal, case.targets_N, distance=distance)
    assert float(found.total.detach()) == pytest.approx(0, abs=1e-12)
    for gradient in torch.autograd.grad(found.total, case.leaves):
        assert float(gradient.abs().max()) < 1e-10


def test_the_binary_distance_is_finite_for_certain_and_for_impossible_text() -> None:
    case = make_case(rows=4)
    with torch.no_grad():
        case.head.weight_VD.mul_(200)  # every row is certain of one token
    for log_p in (0.0, -800.0):
        signal = ChunkSignal(
            torch.arange(4), torch.zeros(4, dtype=torch.long), torch.tensor([log_p])
        )
        found = chunk_loss(case.hidden_ND, case.head, signal, case.targets_N)
        gradients = torch.autograd.grad(found.total, case.leaves)
        assert all(torch.isfinite(each).all() for each in (found.total, *gradients))


def test_no_chunks_give_a_zero_loss_that_is_connected_to_every_parameter() -> None:
    case = make_case(rows=3)
    none = torch.empty(0, dtype=torch.long)
    signal = ChunkSignal(none, none, torch.empty(0))
    found = chunk_loss(case.hidden_ND, case.head, signal, case.targets_N)
    assert found.total.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(found.total, case.leaves))


def test_without_gradients_only_the_value_is_computed() -> None:
    case, signal = make_case(rows=5), chunks_of(5, 2)
    expected = chunk_loss(case.hidden_ND, case.head, signal, case.targets_N).total
    with torch.no_grad():
        found = chunk_loss(case.hidden_ND, case.head, signal, case.targets_N).total
    assert not found.requires_grad
    assert_near(found, expected, 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_P": torch.zeros(2, dtype=torch.long)}, "shapes do not match"),
        ({"chunk_P": torch.full((4,), 9)}, "chunk_P contains the id 9"),
        ({"rows_P": torch.tensor([1, 2, 3, 5])}, "rows_P contains the id 5"),
        ({"log_probs_C": torch.full((2,), torch.nan)}, "log_probs_C is not finite"),
    ],
)
def test_an_inconsistent_signal_is_rejected(change: dict[str, Tensor], message: str) -> None:
    case, signal = make_case(rows=5), chunks_of(5, 2)
    with pytest.raises(SignalError, match=message):
        chunk_loss(case.hidden_ND, case.head, replace(signal, **change), case.targets_N)
