"""Decoding of a store's rows to a signal, without a loop over rows.

Shapes: S segments, n rows of a source, N rows of a batch, K entries of the longest row, G runs of
rows (a chunk, or text between chunks), C chunks, P rows in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.signals.encoded_rows import DenseRows, EntryRows
from stillhouse.signals.encodings import (
    UNITS,
    Encoding,
    EntryEncoding,
    FrozenHead,
    Hidden,
    Sampled,
    Stratified,
    Threshold,
    TopK,
    TopP,
)
from stillhouse.signals.signal_types import (
    ChunkSignal,
    FrozenHeadSignal,
    HiddenSignal,
    SampledSignal,
    SparseSignal,
)

StoredSignal = SparseSignal | SampledSignal | ChunkSignal | FrozenHeadSignal | HiddenSignal


@dataclass(frozen=True, eq=False)
class Source:
    """The segments of a batch that are in one shard, or in memory.

    rows: all rows of the source; planes of ragged rows have GUARD more elements at the end.
    rows_S, first_row_S, first_entry_S, first_value_S: where each segment is in the source. place_n:
    the rows' places in the batch, in order.
    """

    rows: EntryRows | DenseRows
    rows_S: NDArray[np.int64]
    first_row_S: NDArray[np.int64]
    first_entry_S: NDArray[np.int64]
    first_value_S: NDArray[np.int64]
    place_n: NDArray[np.int64]

    def row_indices(self) -> NDArray[np.int64]:
        return ranges(self.first_row_S, self.rows_S)

    def place(self) -> slice | NDArray[np.int64]:
        """`place_n` as an index: a slice if the rows are contiguous, which is faster."""
        if not len(self.place_n):
            return self.place_n
        first, last = int(self.place_n[0]), int(self.place_n[-1])
        together = last - first + 1 == len(self.place_n)
        return slice(first, last + 1) if together else self.place_n

    def starts(self, lengths_n: NDArray[np.uint8], first_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """The start of each row's elements, from the rows' lengths and the segments' starts."""
        before_n = np.cumsum(lengths_n, dtype=np.int64) - lengths_n
        segment_S = np.cumsum(self.rows_S) - self.rows_S
        return before_n + np.repeat(first_S - before_n[segment_S], self.rows_S)


@dataclass(frozen=True, eq=False)
class Padded:
    """Padded rows of a batch.

    Ids past counts_N in a row are arbitrary but valid; values past valued_N are arbitrary.
    """

    counts_N: NDArray[np.uint8]
    valued_N: NDArray[np.uint8]
    ids_NK: NDArray[np.int32]
    values_NK: NDArray[Any]
    tail_N: NDArray[np.float32] | None


def ranges(first_S: NDArray[np.int64], lengths_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenated runs first, first + 1, ..., of the given lengths."""
    before_S = np.cumsum(lengths_S) - lengths_S
    return np.arange(int(lengths_S.sum())) + np.repeat(first_S - before_S, lengths_S)


def pad(sources: Sequence[Source], rows: int) -> Padded:
    """Gather and pad the rows of a batch from their sources, which must all be EntryRows."""
    counts_N, valued_N = np.empty(rows, np.uint8), np.empty(rows, np.uint8)
    found = []
    for source in sources:
        held = source.rows
        assert isinstance(held, EntryRows)
        row_n = source.row_indices()
        counts_n = held.counts_N[row_n]
        valued_n = held.valued_counts[row_n]
        counts_N[source.place()], valued_N[source.place()] = counts_n, valued_n
        found.append((source, held, row_n, counts_n, valued_n))
    most = max(int(counts_N.max(initial=0)), 1)
    most_valued = max(int(valued_N.max(initial=0)), 1)
    first = found[0][1]
    ids_NK = np.empty((rows, most), np.int32)
    values_NK = np.empty((rows, most_valued), first.values_X.dtype)
    tail_N = None if first.tail_N is None else np.empty(rows, np.float32)
    for source, held, row_n, counts_n, valued_n in found:
        start_n = source.starts(counts_n, source.first_entry_S)
        ids_NK[source.place()] = _ids(held, start_n, most)
        value_n = source.starts(valued_n, source.first_value_S)
        values_NK[source.place()] = _windows(held.values_X, most_valued)[value_n]
        if tail_N is not None and held.tail_N is not None:
            tail_N[source.place()] = held.tail_N[row_n]
    return Padded(counts_N, valued_N, ids_NK, values_NK, tail_N)


def _ids(rows: EntryRows, start_n: NDArray[np.int64], most: int) -> NDArray[Any]:
    low_nK = _windows(rows.low_E, most)[start_n]
    if rows.high_E is None:
        return low_nK
    return low_nK + (_windows(rows.high_E, most)[start_n].astype(np.int32) << 16)


def _windows(plane: NDArray[Any], width: int) -> NDArray[Any]:
    """A view of every run of `width` elements of a plane, by its start."""
    shape = (len(plane) - width + 1, width)
    return np.lib.stride_tricks.as_strided(plane, shape, plane.strides * 2, writeable=False)


def entries_signal(encoding: EntryEncoding, rows: Padded, temperature: float) -> StoredSignal:
    """The signal of padded rows: a SparseSignal for top_k and top_p, otherwise a SampledSignal."""
    ids_NK = torch.from_numpy(rows.ids_NK)
    if isinstance(encoding, Stratified | Threshold):
        weights_NK = _shared_weights(rows, UNITS[encoding.probability_bytes])
        return SampledSignal(ids_NK, torch.from_numpy(weights_NK), temperature)
    values_NK = rows.values_NK.astype(np.float32)
    column_K = np.arange(values_NK.shape[1], dtype=np.uint8)
    if isinstance(encoding, Sampled):
        values_NK *= column_K < rows.valued_N[:, None]
        return SampledSignal(ids_NK, torch.from_numpy(values_NK), temperature)
    if isinstance(encoding, TopK) and not encoding.tail:
        return SampledSignal(ids_NK, torch.from_numpy(np.exp(values_NK)), temperature)
    if isinstance(encoding, TopP):
        past_NK = column_K >= rows.counts_N[:, None]
        values_NK[past_NK] = -np.inf
        np.copyto(rows.ids_NK, rows.ids_NK[:, :1], where=past_NK)
    assert rows.tail_N is not None
    return SparseSignal(
        ids_NK, torch.from_numpy(values_NK), torch.from_numpy(rows.tail_N), temperature
    )


def _shared_weights(rows: Padded, units: int) -> NDArray[np.float32]:
    """Weights [N, K] of exact entries, followed by draws that share the remaining mass."""
    wide = rows.values_NK.shape[1]
    column_K = np.arange(rows.ids_NK.shape[1], dtype=np.uint8)
    valued_NX = column_K[:wide] < rows.valued_N[:, None]
    exact_NX = (rows.values_NK * valued_NX).astype(np.float32)
    rest_N = units - exact_NX @ np.ones(wide, np.float32)  # exact, since these are whole numbers
    draws_N = rows.counts_N - rows.valued_N
    share_N = rest_N / (np.maximum(draws_N, 1) * np.float32(units))
    drawn_NK = column_K < rows.counts_N[:, None]
    drawn_NK[:, :wide] ^= valued_NX
    weights_NK = drawn_NK * share_N[:, None]
    weights_NK[:, :wide] += exact_NX * np.float32(1 / units)
    return weights_NK


def chunk_signal(rows: Padded) -> ChunkSignal:
    """The signal of rows with chunks of answers."""
    begins_N = rows.counts_N > 0
    run_N = np.cumsum(begins_N) - 1  # a segment's first row always begins a run
    known_G = rows.valued_N[begins_N] > 0
    chunk_G = np.cumsum(known_G) - 1
    rows_P = np.flatnonzero(known_G[run_N])
    log_probs_C = rows.values_NK[begins_N, 0][known_G].astype(np.float32)
    return ChunkSignal(
        torch.from_numpy(rows_P),
        torch.from_numpy(chunk_G[run_N[rows_P]]),
        torch.from_numpy(log_probs_C),
    )


def dense_signal(
    encoding: FrozenHead | Hidden, sources: Sequence[Source], rows: int, temperature: float
) -> StoredSignal:
    """The signal of dense rows, in bfloat16."""
    first = sources[0].rows
    assert isinstance(first, DenseRows)
    bits_NW = np.empty((rows, first.bits_NW.shape[1]), np.int16)
    scalar_N = np.empty(rows, np.float32)
    for source in sources:
        held = source.rows
        assert isinstance(held, DenseRows)
        row_n = source.row_indices()
        bits_NW[source.place()] = held.bits_NW[row_n].view(np.int16)
        if held.scalar_N is not None:
            scalar_N[source.place()] = held.scalar_N[row_n]
    values_NW: Tensor = torch.from_numpy(bits_NW).view(torch.bfloat16)
    if isinstance(encoding, FrozenHead):
        return FrozenHeadSignal(values_NW, torch.from_numpy(scalar_N), temperature)
    parts = values_NW.split(encoding.width, 1)
    return HiddenSignal(dict(zip(encoding.layers, parts, strict=True)))


def no_rows(encoding: Encoding) -> EntryRows | DenseRows:
    """The rows of an empty batch."""
    bytes_0, floats_0 = np.zeros(0, np.uint8), np.zeros(0, np.float32)
    if isinstance(encoding, FrozenHead | Hidden):
        width = encoding.width * (len(encoding.layers) if isinstance(encoding, Hidden) else 1)
        return DenseRows(np.zeros((0, width), np.uint16), floats_0)
    return EntryRows(bytes_0, bytes_0, np.zeros(0, np.uint16), None, floats_0, floats_0)
