"""How much of the stream's error a projection or a gain corrects, confirmed on rows held out.

With the activations a (N × F) that a projection W reads, and the error E (N × D) of the stream
behind it,

    Δ = Eᵀ a (aᵀ a + λI)⁻¹        (ridge least squares; λ in units of the mean energy of a)

corrects what a change of W can correct on these rows. On other rows it corrects less, or does harm:
there are almost as many unknowns as some thousand rows can determine. So some of the rows are held
out. On them the squared error of W + μΔ is a parabola of μ, with its minimum at

    μ = ⟨aΔᵀ, E⟩ / ‖aΔᵀ‖²

which is used for the Δ of all rows, up to one half: later layers respond too, and not all of the
squared error that it removes matters for their outputs. λ is chosen on them too.

A norm behind a block, or the router's weights before its experts, hide the block's projections from
a refit to the stream, but not the gain of its output, channel by channel: with y (N × D) what a
block adds to the stream, and E what the stream lacks after it,

    g_d = 1 + μ ⟨y_d, E_d⟩ / ‖y_d‖²

is least squares with one unknown per channel. SmolLM2-135M with 26 of its 30 layers, projections
refit only to their own output on 16,384 tokens, costs KL 0.607; with gains 0.539, with up to all of
them 0.583.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stillhouse.pruning.axes import Axes, part
from stillhouse.pruning.ffn import Moments, inverse_moments
from stillhouse.pruning.surgery import set_parameter

NOISES = (0.3, 3.0)
"""λ = noise · F / N, best if the error that activations explain is 1/noise of the rest. The
second is for a cut FFN: of 10⁻⁴ to 3, in SmolLM2's (F = 1,536) λ = 0.3 corrected most on rows
held out of 16,000, and 0.1 of 48,000. The first is for errors that activations explain better."""

LARGEST_SHARE = 0.5
"""The largest share of Δ. SmolLM2-135M before any training, up to one half against up to all:
6 of 9 heads and FFN 1,152, KL 0.475 against 0.517 with 16,384 tokens, 0.415 against 0.751 with
49,152; FFN 1,024 with as many, 0.339 against 0.340."""

HELD_OUT_ONE_IN = 8
"""One in this many rows is held out: the last ones of every batch, which are complete windows."""

HeldOutRows = tuple[Tensor, Tensor | None, Tensor]
"""Activations [n, F], error [n, D] and weights [n] of rows held out."""


class Evidence:
    """The rows of one projection: moments of most of them, and the held-out rows, weighted."""

    def __init__(
        self, width: int, hidden: int, device: torch.device, *, absolute: bool = False
    ) -> None:
        self.moments = Moments.zeros(width, hidden, device, absolute=absolute)
        self._fitted = 0
        self._heldout: list[HeldOutRows] = []

    def add(self, activations_NF: Tensor, error_ND: Tensor | None, weight_N: Tensor) -> None:
        """error_ND: None if a change of this projection cannot correct it."""
        fitted = len(activations_NF) - len(activations_NF) // HELD_OUT_ONE_IN
        self._fitted += fitted
        error = None if error_ND is None else error_ND[:fitted]
        self.moments.add(activations_NF[:fitted], error, weight_N[:fitted])
        error = None if error_ND is None else error_ND[fitted:].clone()
        self._heldout.append((activations_NF[fitted:].clone(), error, weight_N[fitted:]))

    def finish(self) -> tuple[Moments, Tensor]:
        """The moments of all rows, and the change [D, F] that the held-out rows confirm."""
        heldout, self._heldout = self._heldout, []
        per_row = len(self.moments.C_FF) / max(1, self._fitted)
        found = [
            (noise, *_confirmed(least_squares_change(self.moments, noise * per_row), heldout))
            for noise in NOISES
            if any(len(weight_N) and error_ND is not None for _, error_ND, weight_N in heldout)
        ]
        rows = self._fitted
        for activations_NF, error_ND, weight_N in heldout:
            self.moments.add(activations_NF, error_ND, weight_N)
            rows += len(weight_N)
        noise, share, gain = max(found, key=lambda one: one[2], default=(0.0, 0.0, 0.0))
        if gain <= 0.0:
            return self.moments, torch.zeros_like(self.moments.B_DF)
        ridge = noise * len(self.moments.C_FF) / rows
        return self.moments, share * least_squares_change(self.moments, ridge)


def _confirmed(change_DF: Tensor, heldout: Sequence[HeldOutRows]) -> tuple[float, float]:
    """μ, and by how much it lowers the squared error on these rows."""

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for activations_NF, error_ND, weight_N in heldout:
            assert error_ND is not None
            undone_ND = (activations_NF @ change_DF.T) * weight_N[:, None]
            yield undone_ND, error_ND * weight_N[:, None]

    return confirmed_share(rows())


def confirmed_share(rows: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """μ, and by how much it lowers the squared error, from rows [n, D] of what a change corrects
    and of the error."""
    along = across = 0.0
    for undone_ND, error_ND in rows:
        along += float((undone_ND * error_ND).sum())
        across += float(undone_ND.square().sum())
    share = min(LARGEST_SHARE, max(0.0, along / across)) if across > 0 else 0.0
    return share, share * (2 * along - share * across)


def least_squares_change(moments: Moments, ridge: float) -> Tensor:
    """Δ [D, F]; ridge: λ."""
    return (moments.B_DF / moments.unit) @ inverse_moments(moments, ridge)


Rows = tuple[Tensor, Tensor]
"""A block's output and the error of the stream after it, [N, D] each, rows already weighted."""


def channel_gains(batches: Sequence[Rows]) -> Tensor:
    """g [D]; 1 for channels where the held-out rows do not confirm it."""
    fitted, kept = [], []
    for wrote_ND, lacking_ND in batches:
        border = len(wrote_ND) - len(wrote_ND) // HELD_OUT_ONE_IN
        fitted.append((wrote_ND[:border], lacking_ND[:border]))
        kept.append((wrote_ND[border:], lacking_ND[border:]))
    change_D = _best_change(fitted)
    share, _ = confirmed_share((wrote_ND * change_D, lacking_ND) for wrote_ND, lacking_ND in kept)
    return 1 + share * _best_change(batches)


def _best_change(batches: Sequence[Rows]) -> Tensor:
    dots = [(wrote_ND * lacking_ND).sum(0) for wrote_ND, lacking_ND in batches]
    energies = [wrote_ND.square().sum(0) for wrote_ND, _ in batches]
    dots_D, energy_D = torch.stack(dots).sum(0), torch.stack(energies).sum(0)
    # A channel that the block does not write to has no gain.
    return torch.where(energy_D > 0, dots_D / energy_D, 0.0)


def scale_ffn_output(layer: nn.Module, axes: Axes, gain_D: Tensor) -> None:
    """Multiply what an FFN adds to the stream: in the norm behind it, or in its experts."""
    if axes.ffn_output_norm is not None:
        norm, offset = part(layer, axes.ffn_output_norm), axes.norm_offset
        set_parameter(norm, "weight", (norm.weight + offset) * gain_D - offset)
    else:
        assert axes.experts is not None
        experts, name = part(layer, f"{axes.ffn}.{axes.experts.experts}"), axes.experts.down
        set_parameter(experts, name, getattr(experts, name) * gain_D[:, None])
