"""The rows that may still be used.

If the recipe limits its tokens, only the front of the hash order is reachable. Once enough rows are
known, rows behind them are released, and later documents behind the last kept one are never
tokenized: a limited run finds the same rows as with all of them.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import numpy as np

from stillhouse.data.split import CANDIDATE, HASH, Records, divide, in_order, order_key
from stillhouse.data.token_log import LoggedRow

_PLACES = 1 << 8 * HASH
"""Of groups in the order."""

_CANDIDATE = struct.Struct(f"={2 * HASH}sqi?")
"""How a record of CANDIDATE is written."""


class HashSet:
    """A set of hashes in about 20 bytes each: most of them in a sorted array, and the newest in a
    Python set, where each takes 100 bytes."""

    def __init__(self, newest: int = 1 << 16) -> None:
        self._newest = newest
        self._new: set[bytes] = set()
        self._sorted = np.empty(0, dtype=f"S{HASH}")

    def __contains__(self, hash: object) -> bool:
        assert isinstance(hash, bytes)
        short = hash[:HASH]
        if short in self._new:
            return True
        place = int(self._sorted.searchsorted(short))
        return bool((self._sorted[place : place + 1] == short).any())

    def add(self, hash: bytes) -> bool:
        """Whether the hash is new."""
        if hash in self:
            return False
        self._new.add(hash[:HASH])
        if len(self._new) > max(self._newest, len(self._sorted) // 8):
            new = np.array(sorted(self._new), dtype=self._sorted.dtype)
            self._sorted = np.concatenate([self._sorted, new])
            self._sorted.sort(kind="stable")  # merges the two sorted parts
            self._new.clear()
        return True


def _halves(key: bytes) -> tuple[bytes, bytes]:
    """The hashes of a key's group and content; NumPy leaves out zeros at its end."""
    complete = key.ljust(2 * HASH, b"\0")
    return complete[:HASH], complete[HASH:]


@dataclass
class Pool:
    """The place and the size of each row, not its tokens.

    heldout_tokens and train_tokens: as for `split.divide`; train_tokens None keeps everything.
    closed_groups: group hashes that are held out and must not be used. groups: where the group
    hashes of all documents are collected, if they are needed.
    """

    seed: int
    heldout_tokens: int
    train_tokens: int | None
    closed_groups: Container[bytes] = frozenset()
    groups: HashSet | None = None
    duplicates_dropped: int = 0
    overlap_removed: int = 0
    rows_truncated: int = 0
    rows_dropped: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    """How many documents that were read have each format."""
    notes: Counter[str] = field(default_factory=Counter)
    """How many of them have something that is not learned or not read, by what it is."""
    _records: bytearray = field(default_factory=bytearray)
    _tokens: int = 0
    _seen: HashSet = field(default_factory=HashSet)
    _elsewhere: HashSet = field(default_factory=HashSet)
    """The groups of what is used of other sources, if those have a limit of their own."""
    _last: bytes | None = None
    _prune_at: int | None = None

    @property
    def candidates(self) -> Records:
        """Records of CANDIDATE, for use before the next row is added."""
        return np.frombuffer(self._records, dtype=CANDIDATE)

    def admit(self, group: bytes, exact: bytes) -> bytes | None:
        """The place of a new document in the order; None if it is not needed."""
        if not self._seen.add(exact):
            self.duplicates_dropped += 1
            return None
        if self.groups is not None:
            self.groups.add(group)
        if group in self.closed_groups:
            self.overlap_removed += 1
            return None
        key = order_key(self.seed, group, exact)
        if key[:HASH] in self._elsewhere:
            self.duplicates_dropped += 1
            return None
        return None if self._last is not None and key > self._last else key

    def add(self, key: bytes, rows: Iterable[LoggedRow]) -> None:
        for row in rows:
            self._records += _CANDIDATE.pack(key, row.start, row.tokens, row.splittable)
            self._tokens += row.tokens

    def of_source(self, tokens: int) -> Pool:
        """A pool for a source of which about so many tokens are used; then `take` it."""
        return Pool(
            self.seed,
            0,
            tokens,
            self.closed_groups,
            self.groups,
            formats=self.formats,
            notes=self.notes,
            _elsewhere=self._elsewhere,
        )

    def take(self, source: Pool) -> None:
        """Add what a source's pool has within its limit.

        That is the front of the source's order. It is spread over the complete order, so that
        held-out and training text have equal shares of the source. A group is therefore used from
        one source only.
        """
        taken = divide(source.candidates, 0, source.train_tokens).train
        rows = source.candidates[taken["index"]]
        bounded = source._last is not None or len(rows) < len(source.candidates)
        end = 1 + int.from_bytes(_halves(rows["key"][-1])[0]) if bounded and len(rows) else _PLACES
        for key, start, tokens, splittable in rows[["key", "start", "tokens", "splittable"]]:
            group, exact = _halves(key)
            self._elsewhere.add(group)
            spread = int.from_bytes(group) * _PLACES // end
            record = spread.to_bytes(HASH) + exact, int(start), int(tokens), bool(splittable)
            self._records += _CANDIDATE.pack(*record)
            self._tokens += int(tokens)
        self.duplicates_dropped += source.duplicates_dropped
        self.overlap_removed += source.overlap_removed
        self.rows_truncated += source.rows_truncated
        self.rows_dropped += source.rows_dropped

    def prune(self) -> None:
        """Releases rows behind the last one that the limits can reach."""
        if self.train_tokens is None:
            return
        if self._prune_at is None:
            self._prune_at = 2 * (self.heldout_tokens + self.train_tokens)
        if self._tokens < self._prune_at:
            return
        split = divide(self.candidates, self.heldout_tokens, self.train_tokens)
        if split.train["tokens"].sum() < self.train_tokens:
            self._prune_at = 2 * self._tokens
            return
        kept = self.candidates[in_order(self.candidates)[: split.reached]]
        self._records = bytearray(kept.tobytes())
        self._tokens = int(kept["tokens"].sum(dtype=np.int64))
        self._last = bytes(self._records[-CANDIDATE.itemsize :][: 2 * HASH])
        self._prune_at = 2 * self._tokens
