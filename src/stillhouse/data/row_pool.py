"""The rows that may still be used.

If the recipe limits its tokens, only the front of the hash order is reachable. Once enough rows are
known, rows behind them are released, and later documents behind the last kept one are never
tokenized: a limited run over a large text needs little memory, and finds the same rows as with all
of them in memory.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.split import Candidate, OrderKey, divide, order_key
from stillhouse.data.tokenize_rows import TokenRow


@dataclass
class Pool:
    """Tokenized rows, end to end in two arrays.

    heldout_tokens and train_tokens: as for `split.divide`; train_tokens None keeps everything.
    closed_groups: group hashes that are held out and must not be used.
    """

    seed: int
    heldout_tokens: int
    train_tokens: int | None
    closed_groups: Set[bytes] = frozenset()
    candidates: list[Candidate] = field(default_factory=list)
    groups: set[bytes] = field(default_factory=set)
    duplicates_dropped: int = 0
    overlap_removed: int = 0
    rows_truncated: int = 0
    rows_dropped: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    """How many documents that were read have each format."""
    notes: Counter[str] = field(default_factory=Counter)
    """How many of them have something that is not learned or not read, by what it is."""
    _ids: array[int] = field(default_factory=lambda: array("i"))
    _supervised: bytearray = field(default_factory=bytearray)
    _starts: list[int] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)
    _last: OrderKey | None = None
    _prune_at: int | None = None

    def admit(self, group: bytes, exact: bytes) -> OrderKey | None:
        """The place of a new document in the order; None if it is not needed."""
        if exact in self._seen:
            self.duplicates_dropped += 1
            return None
        self._seen.add(exact)
        self.groups.add(group)
        if group in self.closed_groups:
            self.overlap_removed += 1
            return None
        key = order_key(self.seed, group, exact)
        return None if self._last is not None and key > self._last else key

    def add(self, key: OrderKey, rows: list[TokenRow]) -> None:
        for number, row in enumerate(rows):
            place = OrderKey(key.group, key.exact, number)
            self.candidates.append(Candidate(place, len(row.ids), row.splittable))
            self._append(row.ids, row.supervised)

    def _append(self, ids: NDArray[np.int32], supervised: NDArray[np.bool_]) -> None:
        self._starts.append(len(self._ids))
        self._ids.frombytes(np.ascontiguousarray(ids, dtype=np.int32).tobytes())
        self._supervised += supervised.astype(np.uint8).tobytes()

    def row(self, index: int) -> TokenRow:
        """Row `index` of `candidates`, as a view."""
        candidate, start = self.candidates[index], self._starts[index]
        part = slice(start, start + candidate.tokens)
        ids = np.frombuffer(self._ids, dtype=np.int32)[part]
        supervised = np.frombuffer(self._supervised, dtype=np.bool_)[part]
        return TokenRow(ids, supervised, candidate.splittable)

    def prune(self) -> None:
        """Releases rows behind the last one that the limits can reach."""
        if self.train_tokens is None:
            return
        if self._prune_at is None:
            self._prune_at = 2 * (self.heldout_tokens + self.train_tokens)
        if len(self._ids) < self._prune_at:
            return
        split = divide(self.candidates, self.heldout_tokens, self.train_tokens)
        if sum(taken.tokens for taken in split.train) < self.train_tokens:
            self._prune_at = 2 * len(self._ids)
            return
        order = sorted(range(len(self.candidates)), key=lambda n: self.candidates[n].key)
        kept = order[: split.reached]
        last = self.candidates[kept[-1]].key
        rows = [(self.candidates[index], self.row(index)) for index in kept]
        self.candidates = [candidate for candidate, _ in rows]
        self._ids, self._supervised, self._starts = array("i"), bytearray(), []
        for _, row in rows:
            self._append(row.ids, row.supervised)
        # The row number must not exclude later rows of the last document.
        self._last = OrderKey(last.group, last.exact, 0)
        self._prune_at = 2 * len(self._ids)
