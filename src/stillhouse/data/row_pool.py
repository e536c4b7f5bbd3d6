"""The pool of rows that may still be used.

If the recipe limits its tokens, only the first rows in hash order can be used. Once enough rows are
known, later rows in that order are released, and documents that come after the last kept row are
not tokenized. The rows used are the same as if all had been kept.
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
"""Number of possible places of a group in the order."""

_CANDIDATE = struct.Struct(f"={2 * HASH}sqi?")
"""The binary layout of a CANDIDATE record."""


class HashSet:
    """A set of hashes that takes about 20 bytes per hash: most are in a sorted array, and only the
    newest are in a Python set, where each takes 100 bytes."""

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
        """Add the hash; return whether it is new."""
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
    """The hashes of a key's group and content; NumPy strips trailing zeros from the key."""
    complete = key.ljust(2 * HASH, b"\0")
    return complete[:HASH], complete[HASH:]


@dataclass
class Pool:
    """The place and size of each row, without its tokens.

    heldout_tokens, train_tokens: as for `split.divide`; train_tokens None keeps every row.
    closed_groups: hashes of held-out groups, which must not be used. groups: collects the group
    hashes of all documents, if given.
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
    """Number of documents read, by format."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of documents with a part that is not supervised or not read, by note."""
    _records: bytearray = field(default_factory=bytearray)
    _tokens: int = 0
    _seen: HashSet = field(default_factory=HashSet)
    _elsewhere: HashSet = field(default_factory=HashSet)
    """The groups used from other sources that have a `tokens` limit."""
    _last: bytes | None = None
    _prune_at: int | None = None

    @property
    def candidates(self) -> Records:
        """Records of CANDIDATE, for use before the next row is added."""
        return np.frombuffer(self._records, dtype=CANDIDATE)

    def admit(self, group: bytes, exact: bytes) -> bytes | None:
        """Return the place of a new document in the order; None if it is not needed."""
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
        """A pool for a source that is limited to about this many tokens; then `take` it."""
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
        """Add the rows within the limit of a source's pool.

        These are the first rows in the source's order. They are spread over the complete order, so
        that held-out and training text have equal shares of the source. Because this changes their
        places, a group is used from one source only.
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
        """Release rows after the last one that the limits can reach."""
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
