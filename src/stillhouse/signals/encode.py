"""Encoding of a teacher's logits as the rows of a store.

Shapes: n rows of a chunk, V vocabulary, U uniform numbers per row, k top tokens, X entries with a
value, D draws. Only a few rows are processed at a time, so that they stay in the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.signals.encoded_rows import DenseRows, EntryRows, concatenate
from stillhouse.signals.encodings import (
    UNITS,
    EntryEncoding,
    Sampled,
    Stratified,
    Threshold,
    TopK,
    TopP,
)
from stillhouse.signals.selection import (
    Blocks,
    Entries,
    at_least,
    locate,
    place_in_row,
    probabilities,
    sum_of_squares,
    take_out_,
    top_tokens,
)
from stillhouse.signals.signal_types import SparseSignal

CACHED_NUMBERS = 1 << 22
"""Number of logits processed at a time on a CPU; 64 times as many on an accelerator."""


@dataclass(frozen=True)
class Statistics:
    """Sums over rows of an encoding's mass and error. The manifest contains their means.

    mass: the teacher's probability of the stored tokens. variance: Σ_i Var(p̂_i) of the estimate,
    in closed form from the true p. squared_bias: Σ_i (E p̂_i − p_i)², if the encoding's p̂ is a
    full distribution.
    """

    mass: float = 0.0
    variance: float = 0.0
    squared_bias: float = 0.0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Encoder:
    """Encodes chunks of logits, in a buffer that it reuses.

    Each call gets `uniforms_nU`, `encoding.draws_per_row` numbers in [0, 1) for each row. They are
    the only source of randomness, so equal numbers produce equal rows.
    """

    encoding: EntryEncoding
    vocabulary: int
    temperature: float = 1.0
    _buffer: Tensor | None = None

    def __call__(self, logits_nV: Tensor, uniforms_nU: Tensor) -> tuple[EntryRows, Statistics]:
        """Encode float32 logits [n, V] of at least one row; returns rows and their statistics.

        Raises SignalError: the logits are not finite, have the wrong vocabulary, or have fewer
        tokens than the encoding stores.
        """
        if logits_nV.ndim != 2 or logits_nV.shape[1] != self.vocabulary:
            raise SignalError(
                f"the logits have shape {tuple(logits_nV.shape)}, but the store's vocabulary has "
                f"{self.vocabulary} tokens",
                fix="cut the logits to the vocabulary that teacher and student share",
            )
        on_cpu = logits_nV.device.type == "cpu"
        step = max(1, CACHED_NUMBERS * (1 if on_cpu else 64) // self.vocabulary)
        parts, statistics = [], Statistics()
        uniforms_nU = uniforms_nU.to(logits_nV.device)
        for start in range(0, len(logits_nV), step):
            part_nV = logits_nV[start : start + step].float()
            blocks = probabilities(part_nV, self.temperature, self._buffer_like(part_nV))
            encode = ENCODERS[type(self.encoding)]
            rows, more = encode(self.encoding, blocks, uniforms_nU[start : start + step])
            parts.append(rows)
            statistics += more
        return concatenate(parts), statistics

    def _buffer_like(self, part_nV: Tensor) -> Tensor:
        buffer = self._buffer
        if buffer is None or buffer.device != part_nV.device or len(buffer) < len(part_nV):
            self._buffer = torch.empty_like(part_nV)
        assert self._buffer is not None
        return self._buffer


def frozen_head_rows(
    logits_NV: Tensor, weight_VD: Tensor, temperature: float = 1.0
) -> tuple[DenseRows, Statistics]:
    """Compute Wᵀp and Σ p log p for the student's frozen head W (see `FrozenHeadSignal`)."""
    log_p_NV = (logits_NV.float() / temperature).log_softmax(1)
    p_NV = log_p_NV.exp()
    negative_entropy_N = torch.where(p_NV > 0, p_NV * log_p_NV, 0.0).sum(1)
    rows = DenseRows(_bf16_bits(p_NV @ weight_VD.float()), negative_entropy_N.cpu().numpy())
    return rows, Statistics(mass=float(len(rows)))


def top_k_rows(signal: SparseSignal, vocabulary: int) -> tuple[EntryRows, Statistics]:
    """Encode a signal of top tokens as `TopK` stores it."""
    ids_NK, log_p_NK = signal.ids_NK, signal.log_probs_NK.cpu().double().numpy()
    counts_N, values_X = torch.full((len(ids_NK),), ids_NK.shape[1]), log_p_NK.ravel().astype("<f2")
    rows = EntryRows.of(vocabulary, counts_N, ids_NK.flatten(), values_X, tail_N=signal.tail_N)
    return rows, Statistics(mass=float(np.exp(log_p_NK).sum(1).clip(max=1.0).sum()))


def hidden_rows(hidden_ND: Mapping[int, Tensor]) -> tuple[DenseRows, Statistics]:
    """Encode hidden states by layer, concatenated in the mapping's order."""
    rows = DenseRows(_bf16_bits(torch.cat([h.float() for h in hidden_ND.values()], 1)), None)
    return rows, Statistics(mass=float(len(rows)))


def _bf16_bits(values_NW: Tensor) -> NDArray[np.uint16]:
    return values_NW.to(torch.bfloat16).view(torch.int16).cpu().numpy().view("<u2")


# --- top tokens ----------------------------------------------------------------------------


def _top(
    encoding: TopK | TopP, blocks: Blocks, uniforms_nU: Tensor
) -> tuple[EntryRows, Statistics]:
    most = encoding.k if isinstance(encoding, TopK) else encoding.most
    p_nk, ids_nk = top_tokens(blocks, most)
    p_nk = p_nk.double()
    if isinstance(encoding, TopP):
        kept_nk = p_nk.cumsum(1) - p_nk < encoding.p
    else:
        kept_nk = torch.ones_like(p_nk, dtype=torch.bool)
    mass_n = (p_nk * kept_nk).sum(1)
    tail_n = (1.0 - mass_n).clamp(0.0, 1.0)
    squared_bias = 0.0
    if isinstance(encoding, TopK) and not encoding.tail:
        squares_n = p_nk.square().sum(1)
        more_n = sum_of_squares(blocks.p_nV) - squares_n
        squared_bias = float((squares_n * (tail_n / mass_n).square() + more_n).sum())
    log_p_X = p_nk[kept_nk].log().clamp(min=torch.finfo(torch.float16).min).half().cpu().numpy()
    counts_n, ids_E = kept_nk.sum(1), ids_nk[kept_nk]
    rows = EntryRows.of(blocks.vocabulary, counts_n, ids_E, log_p_X, tail_N=tail_n)
    return rows, Statistics(float(mass_n.sum()), 0.0, squared_bias)


# --- draws with replacement ----------------------------------------------------------------


def _sampled(
    encoding: Sampled, blocks: Blocks, uniforms_nU: Tensor
) -> tuple[EntryRows, Statistics]:
    p_nV, draws = blocks.p_nV, encoding.draws
    squares_n = sum_of_squares(p_nV)
    proposal, second_moment_n = blocks, torch.ones_like(squares_n)
    if encoding.exponent != 1.0:
        q_nV = p_nV.pow(encoding.exponent)
        norm_n1 = q_nV.sum(1, keepdim=True)
        q_nV /= norm_n1
        proposal = Blocks(
            q_nV, q_nV.unflatten(1, (-1, blocks.block)).sum(2), vocabulary=blocks.vocabulary
        )
        second_moment_n = (p_nV.pow(2.0 - encoding.exponent).sum(1) * norm_n1[:, 0]).double()
    rows_D = torch.arange(blocks.rows, device=p_nV.device).repeat_interleave(draws)
    ids_D, _ = locate(proposal, rows_D, uniforms_nU.flatten())
    flat_E, counts_E = torch.unique(rows_D * p_nV.shape[1] + ids_D, return_counts=True)
    rows_E, ids_E = flat_E // p_nV.shape[1], flat_E % p_nV.shape[1]
    p_E = p_nV.view(-1)[flat_E].double()
    if encoding.exponent == 1.0:
        values_E = counts_E.to(torch.uint8)
    else:
        weights_E = counts_E * p_E / proposal.p_nV.view(-1)[flat_E]
        # A row's scale is arbitrary, since it is normalized when read; make the largest weight 1.
        largest_n = torch.zeros_like(squares_n).scatter_reduce(0, rows_E, weights_E, "amax")
        values_E = (weights_E / largest_n[rows_E]).half()
    counts_n = torch.bincount(rows_E, minlength=blocks.rows)
    rows = EntryRows.of(blocks.vocabulary, counts_n, ids_E, values_E.cpu().numpy())
    variance = float((second_moment_n - squares_n).sum()) / draws
    return rows, Statistics(float(p_E.sum()), variance, 0.0)


# --- exact likely tokens, draws from the rest ----------------------------------------------


def _stratified(
    encoding: Stratified, blocks: Blocks, uniforms_nU: Tensor
) -> tuple[EntryRows, Statistics]:
    p_nk, ids_nk = top_tokens(blocks, encoding.k)
    ids_nk, order_nk = ids_nk.sort(1)
    rows_nk = torch.arange(blocks.rows, device=ids_nk.device)[:, None].expand_as(ids_nk)
    p_nk = p_nk.gather(1, order_nk).double()
    exact = Entries(rows_nk.flatten(), ids_nk.flatten(), p_nk.flatten())
    take_out_(blocks, exact)
    tail_n = blocks.sums_nB.sum(1, dtype=torch.float64)
    draws_n = torch.where(tail_n > 0, encoding.draws, 0)
    # A token that is more likely than one draw's weight w is drawn ⌊p/w⌋ or ⌊p/w⌋ + 1 times.
    weight_n1 = (tail_n / encoding.draws).clamp(min=1e-30).float()[:, None]
    part_nV = (blocks.p_nV / weight_n1).frac_()
    drawn_n = (part_nV.sum(1) - sum_of_squares(part_nV)) * weight_n1[:, 0].double().square()
    units = UNITS[encoding.probability_bytes]
    return _exact_and_drawn(blocks, exact, draws_n, uniforms_nU, units, drawn_n)


def _threshold(
    encoding: Threshold, blocks: Blocks, uniforms_nU: Tensor
) -> tuple[EntryRows, Statistics]:
    exact = at_least(blocks, encoding.tau)
    take_out_(blocks, exact)
    tail_n = blocks.sums_nB.sum(1, dtype=torch.float64)
    draws_n = torch.where(tail_n > 0, (tail_n / encoding.tau).floor().clamp(min=1), 0).long()
    drawn_n = tail_n.square() / draws_n.clamp(min=1) - sum_of_squares(blocks.p_nV)
    units = UNITS[encoding.probability_bytes]
    return _exact_and_drawn(blocks, exact, draws_n, uniforms_nU, units, drawn_n)


def _exact_and_drawn(
    blocks: Blocks,
    exact: Entries,
    draws_n: Tensor,
    uniforms_nU: Tensor,
    units: int,
    drawn_variance_n: Tensor,
) -> tuple[EntryRows, Statistics]:
    """Encode exact entries as multiples of 1/units, and `draws_n` systematic draws from the rest in
    `blocks`.

    drawn_variance_n: the draws' variance if the exact entries were not rounded. Rounding is also
    systematic: a row's running sum is shifted by one uniform number and rounded down. Every value
    is p · units on average and off by less than 1, and so is the sum, which therefore never exceeds
    `units`.
    """
    n, rows_X = blocks.rows, exact.rows_X
    tail_n = blocks.sums_nB.sum(1, dtype=torch.float64)
    mass_n = torch.zeros_like(tail_n).index_add(0, rows_X, exact.p_X)
    valued_n = torch.bincount(rows_X, minlength=n)
    whole_n = mass_n + tail_n
    scaled_X = exact.p_X / whole_n[rows_X] * units
    upto_X = scaled_X.cumsum(0)
    last_n = valued_n.cumsum(0) - 1
    before_n = torch.cat([upto_X.new_zeros(1), upto_X])[(last_n + 1 - valued_n)]
    upto_X = upto_X - before_n[rows_X]
    has_n = valued_n > 0
    # Without a tail there are only exact entries, whose sum is `units` however they are rounded.
    upto_X[last_n[has_n]] = (mass_n / whole_n * units)[has_n]
    steps_X = (upto_X + uniforms_nU[rows_X, 0]).floor()
    first_X = place_in_row(rows_X, valued_n) == 0
    values_X = steps_X - torch.where(first_X, 0.0, steps_X.roll(1))
    rest_n = units - torch.zeros_like(tail_n).index_add(0, rows_X, values_X)
    draws_n = torch.where(rest_n > 0, draws_n, 0)  # draws with zero weight are not stored

    rows_D = torch.arange(n, device=rows_X.device).repeat_interleave(draws_n)
    place_D = place_in_row(rows_D, draws_n)
    ids_D, p_D = locate(blocks, rows_D, (place_D + uniforms_nU[rows_D, 1]) / draws_n[rows_D])

    counts_n = valued_n + draws_n
    start_n = counts_n.cumsum(0) - counts_n
    ids_E = torch.empty(len(rows_X) + len(rows_D), dtype=torch.long, device=rows_X.device)
    ids_E[start_n[rows_X] + place_in_row(rows_X, valued_n)] = exact.ids_X
    ids_E[start_n[rows_D] + valued_n[rows_D] + place_D] = ids_D
    whole_X = values_X.cpu().numpy().astype("<u1" if units == UNITS[1] else "<u2")
    rows = EntryRows.of(blocks.vocabulary, counts_n, ids_E, whole_X, valued_N=valued_n)
    rounding = float((scaled_X.frac() * (1.0 - scaled_X.frac())).sum()) / units**2
    variance = float(drawn_variance_n.clamp(min=0.0).sum()) + rounding
    return rows, Statistics(float(mass_n.sum() + p_D.sum()), variance, 0.0)


ENCODERS: Mapping[Any, Callable[[Any, Blocks, Tensor], tuple[EntryRows, Statistics]]] = {
    TopK: _top,
    TopP: _top,
    Sampled: _sampled,
    Stratified: _stratified,
    Threshold: _threshold,
}
