"""Tuning of `Threshold`'s tau for a given size, on a sample of the teacher's rows.

Shapes: n rows of the sample, V vocabulary, K top tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.signals.encoded_rows import id_bytes
from stillhouse.signals.encodings import MOST_ENTRIES, UNITS, Threshold
from stillhouse.signals.selection import probabilities, top_tokens

ROW_BYTES = 2
"""Bytes of a row's two counts. The tuned size excludes keys and offsets (28 bytes per segment)."""
STEPS = 40


@dataclass(frozen=True)
class Tuned:
    """A tuned encoding, and the entries and bytes per row that it is expected to store."""

    encoding: Threshold
    entries_per_row: float
    bytes_per_row: float


def top_probabilities(logits_nV: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the sample for `tune_threshold`: each row's largest probabilities, in order."""
    k = min(MOST_ENTRIES, logits_nV.shape[1])
    return top_tokens(probabilities(logits_nV.float(), temperature), k)[0]


def tune_threshold(
    p_nK: Tensor,
    vocabulary: int,
    *,
    entries: float | None = None,
    size: float | None = None,
    probability_bytes: Literal[1, 2] = 1,
) -> Tuned:
    """Find the tau at which rows have `entries` entries, or `size` bytes, on average.

    p_nK: from `top_probabilities`. This bisects closed forms, which decrease as tau grows. Raises
    SignalError if no tau fits, or unless exactly one of `entries` and `size` is given.
    """
    target = entries if entries is not None else size
    if target is None or (entries is not None and size is not None):
        raise SignalError("give either entries or a size")

    def at(tau: float) -> Tuned:
        return expected(p_nK, Threshold(tau, probability_bytes), vocabulary)

    def measure(tuned: Tuned) -> float:
        return tuned.entries_per_row if entries is not None else tuned.bytes_per_row

    low, high = 1 / (MOST_ENTRIES - 1), 1.0
    least, most = measure(at(high)), measure(at(low))
    if not least <= target <= most:
        name = "entries" if entries is not None else "bytes"
        low, high = math.ceil(10 * least) / 10, math.floor(10 * most) / 10
        raise SignalError(
            f"{target:g} {name} per row are not possible with these probabilities",
            fix=f"choose a number from {low:.1f} to {high:.1f}",
        )
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if measure(at(middle)) > target else (low, middle)
    return at(high)


def expected(p_nK: Tensor, encoding: Threshold, vocabulary: int) -> Tuned:
    """The average entries and bytes that `encoding` stores per row, for a sample from
    `top_probabilities`."""
    p_nK = p_nK.double()
    exact_nK = p_nK >= encoding.tau
    exact_n = exact_nK.sum(1)
    tail_n = (1.0 - (p_nK * exact_nK).sum(1)).clamp(min=0.0)
    draws_n = (tail_n / encoding.tau).floor().clamp(min=1.0)
    # A tail of less than one unit is rounded to 0 or 1 at random, and has a draw only if it is 1.
    draws_n *= (tail_n * UNITS[encoding.probability_bytes]).clamp(max=1.0)
    entries, exact = float((exact_n + draws_n).mean()), float(exact_n.double().mean())
    size = ROW_BYTES + id_bytes(vocabulary) * entries + encoding.probability_bytes * exact
    return Tuned(encoding, entries, size)
