"""Removing neurons group by group agrees with plain least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stillhouse.pruning import refit as refitting
from stillhouse.pruning.correction import least_squares_change
from stillhouse.pruning.refit import Moments, activation_scores, best, refit_and_remove, refit_to


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(refitting, "RIDGE", 1e-12)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(count: int, width: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mixing = torch.randn(width, width) * 0.5 + torch.eye(width)
    activations = torch.randn(count, width) @ mixing
    return activations, torch.randn(hidden, width), torch.randn(count, hidden), torch.rand(count)


def corrected(down: Tensor, activations: Tensor, error: Tensor, weight: Tensor) -> Tensor:
    """The projection that corrects the whole error on these rows."""
    B = (error * weight[:, None]).T @ (activations * weight[:, None])
    return down + least_squares_change(moments_of(activations, weight), B, ridge=1e-12)


def moments_of(activations: Tensor, weight: Tensor) -> Moments:
    moments = Moments.zeros(activations.shape[1])
    for part in torch.arange(len(activations)).split(37):
        moments.add(activations[part], weight[part])
    return moments


def test_the_refit_is_the_weighted_least_squares_solution() -> None:
    activations, down, error, weight = rows(200, 12, 5)
    target = activations @ down.T + error
    moments = moments_of(activations, weight)
    kept, refit = refit_and_remove(corrected(down, activations, error, weight), moments, 7)
    scaled = weight[:, None]
    expected = torch.linalg.lstsq(activations[:, kept] * scaled, target * scaled).solution.T
    assert_close(refit, expected, rtol=1e-6, atol=1e-8)
    assert kept.tolist() == sorted(kept.tolist())


def test_the_cheapest_neuron_is_removed() -> None:
    activations, down, error, weight = rows(200, 9, 5)
    target = activations @ down.T + error
    scaled = weight[:, None]

    def loss(kept: tuple[int, ...]) -> float:
        inputs = activations[:, list(kept)] * scaled
        solution = torch.linalg.lstsq(inputs, target * scaled).solution
        return (inputs @ solution - target * scaled).square().sum().item()

    best = min(itertools.combinations(range(9), 8), key=loss)
    moments = moments_of(activations, weight)
    kept, _ = refit_and_remove(corrected(down, activations, error, weight), moments, 8)
    assert tuple(kept.tolist()) == best


def test_removing_neurons_in_groups_gives_the_least_squares_solution_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    activations, down, error, weight = rows(300, 24, 5)
    moments = moments_of(activations, weight)
    for groups in (24, 4):
        monkeypatch.setattr(refitting, "GROUPS_PER_WIDTH", groups)
        kept, refit = refit_and_remove(corrected(down, activations, error, weight), moments, 10)
        scaled = weight[:, None]
        target = (activations @ down.T + error) * scaled
        expected = torch.linalg.lstsq(activations[:, kept] * scaled, target).solution.T
        assert_close(refit, expected, rtol=1e-5, atol=1e-7)


def test_nothing_changes_without_an_error_or_a_removal() -> None:
    activations, down, _, weight = rows(50, 12, 5)
    kept, refit = refit_and_remove(down, moments_of(activations, weight), 12)
    assert kept.tolist() == list(range(12))
    assert torch.equal(refit, down)


def test_neurons_that_never_fire_are_removed_first() -> None:
    activations, down, _, weight = rows(100, 20, 5)
    activations[:, :4] = 0
    kept, _ = refit_and_remove(down, moments_of(activations, weight), 16)
    assert kept.tolist() == list(range(4, 20))


def test_fewer_rows_than_neurons_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    activations, down, _, weight = rows(6, 20, 5)
    monkeypatch.setattr(refitting, "RIDGE", 0.0)
    _, refit = refit_and_remove(down, moments_of(activations, weight), 10)
    assert refit.isfinite().all()
    monkeypatch.setattr(refitting, "RIDGE", 1e-3)
    _, refit = refit_and_remove(down, Moments.zeros(20), 10)
    assert refit.isfinite().all()


def test_activation_scores_are_squared_norms_times_column_norms() -> None:
    activations, down, _, weight = rows(50, 12, 5)
    weighted, columns = activations * weight[:, None], down.square().sum(0)
    l2 = weighted.square().sum(0) * columns
    assert_close(activation_scores(moments_of(activations, weight), down), l2)
    moments = Moments.zeros(12, absolute=True)
    moments.add(activations, weight)
    assert_close(activation_scores(moments, down), weighted.abs().sum(0).square() * columns)
    assert best(l2, 5).tolist() == sorted(sorted(range(12), key=lambda f: -l2[f])[:5])


def test_a_given_choice_is_refit_by_least_squares() -> None:
    activations, down, error, weight = rows(200, 12, 5)
    kept = torch.tensor([0, 3, 4, 7, 11])
    moments = moments_of(activations, weight)
    refit = refit_to(corrected(down, activations, error, weight), moments, kept)
    target = (activations @ down.T + error) * weight[:, None]
    inputs = activations[:, kept] * weight[:, None]
    assert_close(refit, torch.linalg.lstsq(inputs, target).solution.T, rtol=1e-6, atol=1e-8)
