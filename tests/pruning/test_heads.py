"""Removing heads agrees with plain least squares, block by block; groups stay equal in size."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stillhouse.pruning import refit as refitting
from stillhouse.pruning.refit import (
    Moments,
    activation_scores,
    heads_by_score,
    refit_and_remove_heads,
)
from stillhouse.pruning.sizes import Sizes

HIDDEN = 5
BEFORE = Sizes(
    layers=1, ffn_size=8, heads=6, kv_heads=2, head_dim=2, hidden_size=HIDDEN, vocabulary=8
)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(refitting, "RIDGE", 1e-12)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(count: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    width = BEFORE.heads * BEFORE.head_dim
    mixing = torch.randn(width, width) * 0.5 + torch.eye(width)
    return torch.randn(count, width) @ mixing, torch.randn(HIDDEN, width)


def moments_of(heads_NA: Tensor) -> Moments:
    moments = Moments.zeros(heads_NA.shape[1])
    moments.add(heads_NA, torch.ones(len(heads_NA)))
    return moments


def loss(heads_NA: Tensor, output_DA: Tensor, kept: tuple[int, ...]) -> float:
    read = heads_NA[:, BEFORE.columns(kept)]
    target = heads_NA @ output_DA.T
    return (read @ torch.linalg.lstsq(read, target).solution - target).square().sum().item()


def with_heads(groups: int, share: int) -> Sizes:
    return replace(BEFORE, heads=groups * share, kv_heads=groups)


def remove(heads_NA: Tensor, output_DA: Tensor, groups: int, share: int) -> tuple:  # type: ignore[type-arg]
    return refit_and_remove_heads(
        output_DA, moments_of(heads_NA), BEFORE, with_heads(groups, share)
    )


def test_the_refit_is_the_least_squares_solution() -> None:
    heads_NA, output_DA = rows()
    kept, refit = remove(heads_NA, output_DA, 2, 1)
    read = heads_NA[:, BEFORE.columns(kept)]
    expected = torch.linalg.lstsq(read, heads_NA @ output_DA.T).solution.T
    assert_close(refit, expected, rtol=1e-5, atol=1e-7)
    assert sorted(head // BEFORE.share for head in kept) == [0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_group_is_removed(seed: int) -> None:
    heads_NA, output_DA = rows(seed=seed)
    kept, _ = remove(heads_NA, output_DA, 1, 3)
    assert kept == min([(0, 1, 2), (3, 4, 5)], key=lambda one: loss(heads_NA, output_DA, one))


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_head_is_removed_first(seed: int) -> None:
    heads_NA, output_DA = rows(seed=seed)
    kept, _ = remove(heads_NA, output_DA, 2, 2)
    first = min(itertools.combinations(range(6), 5), key=lambda one: loss(heads_NA, output_DA, one))
    gone = next(head for head in range(6) if head not in first)
    assert gone not in kept
    # Its group then has the requested size, so the next head is removed from the other one.
    other = [head for head in range(6) if head // 3 != gone // 3]
    second = min(
        other, key=lambda head: loss(heads_NA, output_DA, tuple(h for h in first if h != head))
    )
    assert kept == tuple(head for head in first if head != second)


def test_heads_are_ranked_by_energy_times_squared_column_norm() -> None:
    heads_NA, output_DA = rows()
    moments = moments_of(heads_NA)
    score = (heads_NA.square().sum(0) * output_DA.square().sum(0)).view(6, 2).sum(1)
    found = activation_scores(moments, output_DA).view(6, 2).sum(1)
    assert_close(found, score)
    best = [int(score[:3].argmax()), 3 + int(score[3:].argmax())]
    assert list(heads_by_score(score, BEFORE, with_heads(2, 1))) == best
    group = int(score.view(2, 3).sum(1).argmax())
    expected = tuple(range(3 * group, 3 * group + 3))
    assert heads_by_score(score, BEFORE, with_heads(1, 3)) == expected
