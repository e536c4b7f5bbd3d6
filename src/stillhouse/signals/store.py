"""Reading of the teacher's signals for the segments of a batch from a finished store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import SignalError, StoreError
from stillhouse.signals.decode import (
    Source,
    StoredSignal,
    chunk_signal,
    dense_signal,
    entries_signal,
    no_rows,
    pad,
    ranges,
)
from stillhouse.signals.encoded_rows import GUARD, EntryRows, Rows
from stillhouse.signals.encodings import AnswerChunks, FrozenHead, Hidden
from stillhouse.signals.manifest import SHARDS, Manifest, Settings, check_expected, read_manifest
from stillhouse.signals.segments import Segments
from stillhouse.signals.shards import Shard, allow_open_files, open_shard, read_keys


@dataclass(eq=False)
class Store:
    """An open store, as returned by `open_store`. Forked processes can continue to use it.

    A shard is mapped, and its checksum verified, when one of its rows is first read.
    """

    path: Path
    manifest: Manifest
    _numbers: dict[bytes, int]
    _first_S: NDArray[np.int64]
    _open: dict[int, Shard] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return self.manifest.settings

    def missing(self, segments: Segments) -> NDArray[np.bool_]:
        """Which segments the store lacks, [S]."""
        return np.array([key not in self._numbers for key in segments.keys], dtype=np.bool_)

    def covers(self, segments: Segments) -> bool:
        """Whether the store has every segment."""
        return all(key in self._numbers for key in segments.keys)

    def read(self, segments: Segments, live: Rows | None = None) -> StoredSignal:
        """Read the teacher's signal for a batch. Row n belongs to its n-th supervised token.

        live: encoded rows of the segments that are `missing`, in their order, from a live teacher.
        Raises SignalError if segments are missing and `live` is None. StoreError if a shard is
        damaged.
        """
        lacking_S = self.missing(segments)
        if lacking_S.any() and live is None:
            raise self._lacks(int(lacking_S.sum()), segments)
        sources = self._sources(segments, lacking_S, live)
        encoding, temperature = self.settings.encoding, self.settings.temperature
        if not sources:
            sources = [live_source(no_rows(encoding), segments.rows_S, segments.rows_S)]
        if isinstance(encoding, FrozenHead | Hidden):
            return dense_signal(encoding, sources, segments.rows, temperature)
        padded = pad(sources, segments.rows)
        if isinstance(encoding, AnswerChunks):
            return chunk_signal(padded)
        return entries_signal(encoding, padded, temperature)

    def _sources(
        self, segments: Segments, lacking_S: NDArray[np.bool_], live: Rows | None
    ) -> list[Source]:
        number_S = np.array([self._numbers.get(key, -1) for key in segments.keys], dtype=np.int64)
        shard_S = np.searchsorted(self._first_S, number_S, side="right") - 1
        first_place_S = np.cumsum(segments.rows_S) - segments.rows_S
        sources = []
        for index in np.unique(shard_S).tolist():
            chosen_S = shard_S == index
            rows_S = segments.rows_S[chosen_S]
            place_n = ranges(first_place_S[chosen_S], rows_S)
            if index < 0:
                assert live is not None
                assert len(live) == len(place_n)
                sources.append(live_source(live, rows_S, place_n))
                continue
            shard = self._shard(index)
            within_S = number_S[chosen_S] - self._first_S[index]
            if not np.array_equal(shard.rows_S[within_S], rows_S):
                raise StoreError("segments' lengths do not match their keys", where=shard.path)
            row_S, entry_S, value_S = (first_S[within_S] for first_S in shard.firsts)
            sources.append(Source(shard.rows, rows_S, row_S, entry_S, value_S, place_n))
        return sources

    def _shard(self, index: int) -> Shard:
        if index not in self._open:
            listed = self.manifest.shards[index]
            shard = open_shard(self.path / SHARDS / listed.name, self.settings, listed.xxh3)
            if shard.crc32 != listed.crc32:
                raise StoreError(
                    "the shard is not the one listed in the manifest",
                    where=shard.path,
                    fix="restore it from a copy, or record the store again",
                )
            self._open[index] = shard
        return self._open[index]

    def _lacks(self, count: int, segments: Segments) -> SignalError:
        return SignalError(
            f"the store lacks {count} of {len(segments)} segments of this batch",
            where=self.path,
            fix="record this dataset (recorded segments are kept), or score the missing segments "
            "with a live teacher",
        )


def open_store(
    path: Path,
    expect: Mapping[str, str] | None = None,
    *,
    temperature: float | None = None,
    vocabulary: int | None = None,
) -> Store:
    """Open a finished store, and check that it is the expected one.

    expect: expected fields of its identity, e.g. {"teacher": "sha256..."}. Raises SignalError, with
    both values, if one of them, the temperature, or the vocabulary differs. StoreError if the store
    is unfinished or damaged, or if a shard is missing.
    """
    manifest = read_manifest(path)
    check_expected(manifest.settings, path, expect or {}, temperature, vocabulary)
    allow_open_files(len(manifest.shards))
    numbers: dict[bytes, int] = {}
    first = []
    count = 0
    for listed in manifest.shards:
        keys = read_keys(path / SHARDS / listed.name)
        first.append(count)
        for number, key in enumerate(keys, count):
            numbers.setdefault(key, number)
        count += len(keys)
    return Store(path, manifest, numbers, np.array(first, dtype=np.int64))


def live_source(rows: Rows, rows_S: NDArray[np.int64], place_n: NDArray[np.int64]) -> Source:
    first_S = np.cumsum(rows_S) - rows_S
    if not isinstance(rows, EntryRows):
        return Source(rows, rows_S, first_S, first_S, first_S, place_n)
    guarded = replace(
        rows,
        low_E=np.pad(rows.low_E, (0, GUARD)),
        high_E=None if rows.high_E is None else np.pad(rows.high_E, (0, GUARD)),
        values_X=np.pad(rows.values_X, (0, GUARD)),
    )
    entry_N = np.cumsum(rows.counts_N, dtype=np.int64) - rows.counts_N
    value_N = np.cumsum(rows.valued_counts, dtype=np.int64) - rows.valued_counts
    return Source(guarded, rows_S, first_S, entry_N[first_S], value_N[first_S], place_n)
