"""Finds the tau of `Threshold` that gives a wanted size, from a sample of the teacher's rows.

Shapes: n rows of the sample, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.signals.encoded_rows import id_bytes
from stillhouse.signals.encodings import MOST_ENTRIES, UNITS, Threshold
from stillhouse.signals.selection import likeliest, probabilities

ROW_BYTES = 2
"""Two counts a row. Keys and offsets, 28 bytes a segment, are not in a tuned size."""
STEPS = 40


@dataclass(frozen=True)
class Tuned:
    """A tuned encoding, and what it is expected to take of each row."""

    encoding: Threshold
    entries_a_row: float
    bytes_a_row: float


def likeliest_probabilities(logits_nV: Tensor, temperature: float = 1.0) -> Tensor:
    """The sample that `tune_threshold` takes: the largest probabilities of each row, in order."""
    k = min(MOST_ENTRIES, logits_nV.shape[1])
    return likeliest(probabilities(logits_nV.float(), temperature), k)[0]


def tune_threshold(
    p_nK: Tensor,
    vocabulary: int,
    *,
    entries: float | None = None,
    size: float | None = None,
    probability_bytes: Literal[1, 2] = 1,
) -> Tuned:
    """The tau at which rows have `entries` entries, or `size` bytes, on average.

    p_nK: of `likeliest_probabilities`. By bisection of the closed forms, which fall as tau grows.
    Raises SignalError: no tau gives that; or neither, or both, of `entries` and `size` were asked
    for.
    """
    wanted = entries if entries is not None else size
    if wanted is None or (entries is not None and size is not None):
        raise SignalError("ask for entries or for a size of a row, one of the two")

    def at(tau: float) -> Tuned:
        return expected(p_nK, Threshold(tau, probability_bytes), vocabulary)

    def measure(tuned: Tuned) -> float:
        return tuned.entries_a_row if entries is not None else tuned.bytes_a_row

    low, high = 1 / (MOST_ENTRIES - 1), 1.0
    least, most = measure(at(high)), measure(at(low))
    if not least <= wanted <= most:
        name = "entries" if entries is not None else "bytes"
        raise SignalError(
            f"{wanted:g} {name} a row are out of reach: from {least:.1f} to {most:.1f} are possible"
        )
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if measure(at(middle)) > wanted else (low, middle)
    return at(high)


def expected(p_nK: Tensor, encoding: Threshold, vocabulary: int) -> Tuned:
    """What `encoding` takes of a row on average, for a sample of `likeliest_probabilities`."""
    p_nK = p_nK.double()
    exact_nK = p_nK >= encoding.tau
    exact_n = exact_nK.sum(1)
    tail_n = (1.0 - (p_nK * exact_nK).sum(1)).clamp(min=0.0)
    draws_n = (tail_n / encoding.tau).floor().clamp(min=1.0)
    # A tail of less than one unit is rounded away, with its draw, in proportion.
    draws_n *= (tail_n * UNITS[encoding.probability_bytes]).clamp(max=1.0)
    entries, exact = float((exact_n + draws_n).mean()), float(exact_n.double().mean())
    size = ROW_BYTES + id_bytes(vocabulary) * entries + encoding.probability_bytes * exact
    return Tuned(encoding, entries, size)
