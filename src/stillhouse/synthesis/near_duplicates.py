"""Finds near duplicates by MinHash, without comparing every pair of texts.

The share of equal entries in two signatures estimates the Jaccard similarity of the two texts' sets
of word triples (Broder, 1997). A signature is split into bands, and only texts that agree on a
whole band are compared (locality-sensitive hashing; Leskovec et al., Mining of Massive Datasets,
ch. 3). The hash functions are multiply-shift (Dietzfelbinger et al., 1997), of which the top 32
bits are kept.

Shapes: S shingles of a text, P entries of a signature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SIGNATURE = 120
"""Entries in a signature; the estimate's standard error is then at most 0.046."""
SHINGLE = 3
"""Words in a shingle."""
_MISSED = 0.01
"""Maximum share of pairs at the threshold that the bands may miss."""


def shingles(words: Sequence[str]) -> set[str]:
    """All sequences of SHINGLE consecutive words; a shorter text is a single shingle."""
    last = max(0, len(words) - SHINGLE)
    return {" ".join(words[at : at + SHINGLE]) for at in range(last + 1)}


def band_rows(threshold: float) -> int:
    """The largest band size that misses few pairs at the threshold."""
    for rows in (12, 10, 8, 6, 5, 4, 3, 2):
        if (1 - threshold**rows) ** (SIGNATURE // rows) <= _MISSED:
            return rows
    return 1


class NearDuplicates:
    """The texts seen so far. threshold: Jaccard similarity from which two count as duplicates.

    Uses 480 bytes of memory per text for its signature, and an entry per band.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._rows = band_rows(threshold)
        chance = np.random.default_rng(0)
        most = np.iinfo(np.uint64).max
        factors_P = chance.integers(0, most, SIGNATURE, np.uint64, endpoint=True)
        self._factors_P = factors_P | np.uint64(1)
        self._offsets_P = chance.integers(0, most, SIGNATURE, np.uint64, endpoint=True)
        self._signatures: list[NDArray[np.uint32]] = []
        self._bands: dict[bytes, list[int]] = {}

    def signature(self, words: Sequence[str]) -> NDArray[np.uint32]:
        hashes = [
            hashlib.blake2b(shingle.encode("utf-8", "replace"), digest_size=8).digest()
            for shingle in shingles(words)
        ]
        hashes_S = np.frombuffer(b"".join(hashes), np.uint64)
        lowest_P = np.full(SIGNATURE, np.iinfo(np.uint32).max, np.uint32)
        for at in range(0, len(hashes_S), 4096):  # bounds memory for a very long text
            part_S = hashes_S[at : at + 4096]
            mixed_SP = (part_S[:, None] * self._factors_P + self._offsets_P) >> np.uint64(32)
            lowest_P = np.minimum(lowest_P, mixed_SP.min(axis=0).astype(np.uint32))
        return lowest_P

    def add(self, words: Sequence[str]) -> float | None:
        """Add a text and return None if it is new; otherwise, return its estimated similarity to an
        earlier text."""
        signature_P = self.signature(words)
        bands = [
            at.to_bytes(1, "big") + signature_P[at : at + self._rows].tobytes()
            for at in range(0, SIGNATURE - self._rows + 1, self._rows)
        ]
        candidates = {number for band in bands for number in self._bands.get(band, ())}
        best = max((self._agreement(signature_P, n) for n in candidates), default=0.0)
        if best >= self.threshold:
            return best
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._signatures))
        self._signatures.append(signature_P)
        return None

    def _agreement(self, signature_P: NDArray[np.uint32], number: int) -> float:
        return float((signature_P == self._signatures[number]).mean())
