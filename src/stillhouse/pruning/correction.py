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

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized

import torch
from torch import Tensor, nn

from stillhouse.pruning.axes import Axes, part
from stillhouse.pruning.calibrate import OwnBatches
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

Rows = tuple[Tensor, Tensor | None, Tensor]
"""Activations [N, F] of a batch, error [N, D] and weights [N]. The error is None if a change of the
projection cannot correct it."""


def fit_projection(
    batches: OwnBatches, rows: Iterable[Rows], zeros: Callable[[], Moments]
) -> tuple[Moments, Tensor]:
    """The moments of all rows, and the change [D, F] that the held-out rows confirm.

    rows: of each of the batches, weighted. zeros: returns moments without rows.
    """
    held: list[Rows] = []

    def fitted() -> Iterator[list[Tensor]]:
        for activations_NF, error_ND, weight_N in rows:
            border = len(activations_NF) - len(activations_NF) // HELD_OUT_ONE_IN
            last_error = None if error_ND is None else error_ND[border:].clone()
            held.append((activations_NF[border:].clone(), last_error, weight_N[border:]))
            first_error = None if error_ND is None else error_ND[:border]
            yield added(activations_NF[:border], first_error, weight_N[:border])

    def added(activations_NF: Tensor, error_ND: Tensor | None, weight_N: Tensor) -> list[Tensor]:
        moments = zeros()
        moments.add(activations_NF, error_ND, weight_N)
        return [*moments.tensors(), _count(activations_NF)]

    def summed(terms: Iterable[list[Tensor]]) -> tuple[Moments, float]:
        *tensors, rows_ = batches.sum(terms, lambda: [*zeros().tensors(), _count(())])
        return Moments(*tensors), float(rows_)

    moments, fitted_rows = summed(fitted())
    width = len(moments.C_FF)
    confirming = (0 if error_ND is None else len(error_ND) for _, error_ND, _ in held)
    (confirmed,) = batches.sum_values(((rows,) for rows in confirming), 1)
    noise = share = gain = 0.0
    for tried in NOISES if confirmed else ():
        change_DF = least_squares_change(moments, tried * width / max(1.0, fitted_rows))
        found = confirmed_share(batches, (_undone(one, change_DF) for one in held))
        if found[1] > gain:
            noise, (share, gain) = tried, found
    more, held_rows = summed(added(*one) for one in held)
    for tensor, other in zip(moments.tensors(), more.tensors(), strict=True):
        tensor += other
    if gain <= 0.0:
        return moments, torch.zeros_like(moments.B_DF)
    ridge = noise * width / (fitted_rows + held_rows)
    return moments, share * least_squares_change(moments, ridge)


def _count(rows: Sized) -> Tensor:
    return torch.tensor(float(len(rows)), dtype=torch.float64)


def _undone(rows: Rows, change_DF: Tensor) -> tuple[Tensor, Tensor]:
    """What a change corrects, and the error, both weighted."""
    activations_NF, error_ND, weight_N = rows
    assert error_ND is not None
    return (activations_NF @ change_DF.T) * weight_N[:, None], error_ND * weight_N[:, None]


def confirmed_share(
    batches: OwnBatches, rows: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """μ, and by how much it lowers the squared error, from each batch's rows [n, D] of what a
    change corrects and of the error."""
    terms = (
        (float((undone_ND * error_ND).sum()), float(undone_ND.square().sum()))
        for undone_ND, error_ND in rows
    )
    along, across = batches.sum_values(terms, 2)
    share = min(LARGEST_SHARE, max(0.0, along / across)) if across > 0 else 0.0
    return share, share * (2 * along - share * across)


def least_squares_change(moments: Moments, ridge: float) -> Tensor:
    """Δ [D, F]; ridge: λ."""
    return (moments.B_DF / moments.unit) @ inverse_moments(moments, ridge)


Written = tuple[Tensor, Tensor]
"""A block's output and the error of the stream after it, [N, D] each, rows already weighted."""


def channel_gains(batches: OwnBatches, rows: Sequence[Written], zeros_D: Tensor) -> Tensor:
    """g [D]; 1 for channels where the held-out rows do not confirm it. rows: of each of the
    batches."""
    fitted, kept = [], []
    for wrote_ND, lacking_ND in rows:
        border = len(wrote_ND) - len(wrote_ND) // HELD_OUT_ONE_IN
        fitted.append((wrote_ND[:border], lacking_ND[:border]))
        kept.append((wrote_ND[border:], lacking_ND[border:]))
    change_D = _best_change(batches, fitted, zeros_D)
    share, _ = confirmed_share(
        batches, ((wrote_ND * change_D, lacking_ND) for wrote_ND, lacking_ND in kept)
    )
    return 1 + share * _best_change(batches, rows, zeros_D)


def _best_change(batches: OwnBatches, rows: Sequence[Written], zeros_D: Tensor) -> Tensor:
    terms = (
        [(wrote_ND * lacking_ND).sum(0), wrote_ND.square().sum(0)] for wrote_ND, lacking_ND in rows
    )
    dots_D, energy_D = batches.sum(terms, lambda: [zeros_D.clone(), zeros_D.clone()])
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
