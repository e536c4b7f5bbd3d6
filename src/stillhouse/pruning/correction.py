"""How much of the stream's error a projection undoes: what rows kept aside confirm.

With the activations a (N × F) that a projection W reads, and the error E (N × D) of the stream
behind it,

    Δ = Eᵀ a (aᵀ a + λI)⁻¹        (ridge least squares; λ in units of the mean energy of a)

undoes what a change of W can undo on these rows. On other rows it undoes less, or does harm: there
are as many unknowns as some thousand rows can just tell. So a part of the rows is kept aside. On
them the squared error of W + μΔ is a parabola of μ, with its least value at

    μ = ⟨aΔᵀ, E⟩ / ‖aΔᵀ‖²

which is taken, within 0 and 1, for the Δ of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.pruning.ffn import Moments, inverse_moments

RIDGE = 0.3
"""λ. Of 10⁻⁴ to 3, what undoes most on the rows kept aside (docs/pruning.md)."""

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
        self._judges: list[Judged] = []

    def add(self, activations_NF: Tensor, error_ND: Tensor | None, weight_N: Tensor) -> None:
        """error_ND: None where a change of this projection cannot undo it."""
        fitted = len(activations_NF) - len(activations_NF) // JUDGES
        rows, others = slice(fitted), slice(fitted, None)
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
        share = _confirmed(self.moments, judges)
        for activations_NF, error_ND, weight_N in judges:
            self.moments.add(activations_NF, error_ND, weight_N)
        if share == 0.0:
            return self.moments, torch.zeros_like(self.moments.B_DF)
        return self.moments, share * least_squares_change(self.moments)


def _confirmed(moments: Moments, judges: Sequence[Judged]) -> float:
    """μ."""
    if not any(len(activations_NF) and error is not None for activations_NF, error, _ in judges):
        return 0.0
    change_DF = least_squares_change(moments)
    along = across = 0.0
    for activations_NF, error_ND, weight_N in judges:
        assert error_ND is not None
        undone_ND = (activations_NF @ change_DF.T) * weight_N[:, None]
        along += float((undone_ND * error_ND * weight_N[:, None]).sum())
        across += float(undone_ND.square().sum())
    return min(1.0, max(0.0, along / across)) if across > 0 else 0.0


def least_squares_change(moments: Moments, ridge: float = RIDGE) -> Tensor:
    """Δ [D, F]."""
    energy = moments.C_FF.diagonal().mean()
    unit = torch.where(energy > 0, energy, 1.0)
    return (moments.B_DF / unit) @ inverse_moments(moments, ridge)
