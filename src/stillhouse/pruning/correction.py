"""How much of the stream's error a projection undoes: what rows kept aside confirm.

With the activations a (N × F) that a projection W reads, and the error E (N × D) of the stream
behind it,

    Δ = Eᵀ a (aᵀ a + λI)⁻¹        (ridge least squares; λ in units of the mean energy of a)

undoes what a change of W can undo on these rows. On other rows it undoes less, or does harm: there
are as many unknowns as some thousand rows can just tell. So a part of the rows is kept aside. On
them the squared error of W + μΔ is a parabola of μ, with its least value at

    μ = ⟨aΔᵀ, E⟩ / ‖aΔᵀ‖²

which is taken for the Δ of all rows, up to one half: the layers behind have their own say, and
what squared error calls undone is not what their answers miss. So is the λ that undoes more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from stillhouse.pruning.ffn import Moments, inverse_moments

NOISES = (0.3, 3.0)
"""λ = noise · F / N, best where what activations explain of the error is 1/noise of the rest. The
second suits a cut FFN: of 10⁻⁴ to 3, in SmolLM2's (F = 1,536) λ = 0.3 undid most on rows kept aside
of 16,000, and 0.1 of 48,000. The first is for errors that activations explain better."""

LARGEST_SHARE = 0.5
"""The most of Δ that is taken. SmolLM2-135M before any training, up to one half against up to all:
6 of 9 heads and FFN 1,152, KL 0.475 against 0.517 with 16,384 tokens, 0.415 against 0.751 with
49,152; FFN 1,024 with as many, 0.339 against 0.340."""

JUDGES = 8
"""One row of so many is kept aside: the last ones of every batch, which are whole windows of it."""


Judged = tuple[Tensor, Tensor | None, Tensor]
"""Activations [n, F], error [n, D] and weights [n] of rows kept aside."""


class Evidence:
    """The rows of one projection: moments of most, the others themselves, weighted."""

    def __init__(
        self, width: int, hidden: int, device: torch.device, *, absolute: bool = False
    ) -> None:
        self.moments = Moments.zeros(width, hidden, device, absolute=absolute)
        self._fitted = 0
        self._judges: list[Judged] = []

    def add(self, activations_NF: Tensor, error_ND: Tensor | None, weight_N: Tensor) -> None:
        """error_ND: None where a change of this projection cannot undo it."""
        fitted = len(activations_NF) - len(activations_NF) // JUDGES
        rows, others = slice(fitted), slice(fitted, None)
        self._fitted += fitted
        self.moments.add(
            activations_NF[rows], None if error_ND is None else error_ND[rows], weight_N[rows]
        )
        self._judges.append(
            (
                activations_NF[others].clone(),
                None if error_ND is None else error_ND[others].clone(),
                weight_N[others],
            )
        )

    def finish(self) -> tuple[Moments, Tensor]:
        """The moments of all rows, and the change [D, F] that the rows kept aside confirm."""
        judges, self._judges = self._judges, []
        per_row = len(self.moments.C_FF) / max(1, self._fitted)
        found = [
            (noise, *_confirmed(least_squares_change(self.moments, noise * per_row), judges))
            for noise in NOISES
            if any(len(weight_N) and error_ND is not None for _, error_ND, weight_N in judges)
        ]
        rows = self._fitted
        for activations_NF, error_ND, weight_N in judges:
            self.moments.add(activations_NF, error_ND, weight_N)
            rows += len(weight_N)
        noise, share, gain = max(found, key=lambda one: one[2], default=(0.0, 0.0, 0.0))
        if gain <= 0.0:
            return self.moments, torch.zeros_like(self.moments.B_DF)
        ridge = noise * len(self.moments.C_FF) / rows
        return self.moments, share * least_squares_change(self.moments, ridge)


def _confirmed(change_DF: Tensor, judges: Sequence[Judged]) -> tuple[float, float]:
    """μ, and by how much it lowers the squared error on these rows."""

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for activations_NF, error_ND, weight_N in judges:
            assert error_ND is not None
            undone_ND = (activations_NF @ change_DF.T) * weight_N[:, None]
            yield undone_ND, error_ND * weight_N[:, None]

    return confirmed_share(rows())


def confirmed_share(rows: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """μ, and by how much it lowers the squared error: of rows [n, D] of what a change undoes, and
    of what there is to undo."""
    along = across = 0.0
    for undone_ND, error_ND in rows:
        along += float((undone_ND * error_ND).sum())
        across += float(undone_ND.square().sum())
    share = min(LARGEST_SHARE, max(0.0, along / across)) if across > 0 else 0.0
    return share, share * (2 * along - share * across)


def least_squares_change(moments: Moments, ridge: float) -> Tensor:
    """Δ [D, F]; ridge: λ."""
    return (moments.B_DF / moments.unit) @ inverse_moments(moments, ridge)
