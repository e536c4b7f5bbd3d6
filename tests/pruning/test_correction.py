"""A projection corrects as much of the residual stream's error as held-out rows confirm."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stillhouse.pruning.calibrate import OwnBatches
from stillhouse.pruning.correction import (
    HELD_OUT_ONE_IN,
    NOISES,
    ProjectionRows,
    fit_projection,
    least_squares_change,
)
from stillhouse.pruning.refit import Moments
from stillhouse.students.pruned_student import MOMENTS

WIDTH, HIDDEN = 24, 5


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(count: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, an error that they explain up to noise, and row weights."""
    torch.manual_seed(7)
    explains, mixing = torch.randn(HIDDEN, WIDTH), torch.randn(WIDTH, WIDTH) + 3 * torch.eye(WIDTH)
    torch.manual_seed(seed)
    activations = torch.randn(count, WIDTH) @ mixing
    error = activations @ explains.T + noise * torch.randn(count, HIDDEN)
    return activations, error, torch.rand(count) + 0.5


def moments_of(activations: Tensor, error: Tensor, weight: Tensor) -> tuple[Moments, Tensor]:
    """C = aᵀ a and B = Eᵀ a of weighted rows."""
    moments = Moments.zeros(WIDTH)
    moments.add(activations, weight)
    return moments, (error * weight[:, None]).T @ (activations * weight[:, None])


def fitted_to(activations: Tensor, error: Tensor | None, weight: Tensor) -> tuple[Moments, Tensor]:
    """The moments and the change that `fit_projection` finds in batches of 40 rows."""
    parts = torch.arange(len(activations)).split(40)
    rows = ProjectionRows(
        [weight[part] for part in parts],
        lambda place, part: activations[parts[place]][part],
        None if error is None else lambda place, part, _: error[parts[place]][part],
    )
    moments, zeros = Moments.zeros(WIDTH), torch.zeros(HIDDEN, WIDTH)
    return moments, fit_projection(OwnBatches(parts, len(parts)), rows, moments, zeros)


def squared_error(change: Tensor, activations: Tensor, error: Tensor, weight: Tensor) -> float:
    left = (error - activations @ change.T) * weight[:, None]
    return left.square().sum().item()


def test_the_share_of_the_change_that_is_applied_is_the_best_on_held_out_rows() -> None:
    activations, error, weight = rows(160, noise=60.0)
    _, change = fitted_to(activations, error, weight)
    fitted = (torch.arange(160) % 40) < 40 - 40 // HELD_OUT_ONE_IN
    moments, B = moments_of(activations[fitted], error[fitted], weight[fitted])
    everything, all_B = moments_of(activations, error, weight)
    held_out = activations[~fitted], error[~fitted], weight[~fitted]
    tried = [
        (squared_error(mu * few, *held_out), float(mu), noise)
        for noise in NOISES
        for few in [least_squares_change(moments, B, noise * WIDTH / int(fitted.sum()))]
        for mu in torch.linspace(0, 1, 1001)
    ]
    _, best, noise = min(tried)
    assert 0.05 < best < 0.95
    expected = best * least_squares_change(everything, all_B, noise * WIDTH / 160)
    assert_close(change, expected, rtol=2e-2, atol=1e-3)


def test_the_least_squares_change_is_that_of_ridge_regression() -> None:
    activations, error, weight = rows(160, noise=1.0)
    moments, B = moments_of(activations, error, weight)
    scaled = activations * weight[:, None]
    ridge = 0.3 * scaled.square().sum(0).mean() * torch.eye(WIDTH)
    expected = torch.linalg.solve(scaled.T @ scaled + ridge, scaled.T @ (error * weight[:, None]))
    assert_close(least_squares_change(moments, B, 0.3), expected.T)


@pytest.mark.parametrize("noise", [0.0, 30.0, 300.0])
def test_a_correction_does_not_harm_fresh_rows(noise: float) -> None:
    _, change = fitted_to(*rows(80, noise))
    fresh = rows(4000, noise, seed=1)
    assert squared_error(change, *fresh) < 1.02 * squared_error(torch.zeros_like(change), *fresh)
    if noise == 0:
        assert squared_error(change, *fresh) < 0.5 * squared_error(0 * change, *fresh)


def test_without_an_error_nothing_is_corrected_and_the_moments_are_of_all_rows() -> None:
    activations, error, weight = rows(100, noise=1.0)
    for given in (None, error):
        moments, change = fitted_to(activations, given, weight)
        assert_close(moments.symmetric(), moments_of(activations, error, weight)[0].symmetric())
        assert change.any() == (given is not None)


def test_too_few_rows_to_hold_any_out_change_nothing() -> None:
    few = (part[: HELD_OUT_ONE_IN - 1] for part in rows(40, noise=0.0))
    assert not fitted_to(*few)[1].any()


class Alive(TorchDispatchMode):
    """Counts the bytes of live tensors that were created within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.most = max(self.most, self.bytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def test_few_matrices_are_in_memory_whatever_the_number_of_batches() -> None:
    """A pairwise sum over 32 batches has at most six terms in memory."""
    width = 256
    batches = [torch.randn(8, width) for _ in range(32)]
    rows = ProjectionRows(
        [torch.ones(8)] * 32,
        lambda place, part: batches[place][part],
        lambda place, part, _: batches[place][part, :HIDDEN],
    )
    with Alive() as alive:
        batches_ = OwnBatches([None] * 32, 32)  # type: ignore[list-item]
        fitted = fit_projection(batches_, rows, Moments.zeros(width), torch.zeros(HIDDEN, width))
    assert fitted.any()
    assert alive.most < 1.1 * MOMENTS * width * width * fitted.itemsize
