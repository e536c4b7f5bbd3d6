"""Splits text into training and held-out text that cannot overlap.

Documents are ordered by a hash of the seed and their content, so the order of files and rows does
not matter. Held-out text comes first in that order, then training text. Documents that differ only
in whitespace or Unicode form share a hash and form a group, which is never split.

Rows are kept as records of 45 bytes in one array, because there can be hundreds of millions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import DataError

HASH = 16
"""Bytes of a SHA-256 hash that are kept: the probability of a collision among 10^12 documents is
about 10^-15."""

Records = NDArray[Any]

CANDIDATE = np.dtype(
    {
        "names": ["key", "group", "start", "tokens", "splittable"],
        "formats": [f"S{2 * HASH}", f"S{HASH}", "i8", "i4", "?"],
        "offsets": [0, 0, 2 * HASH, 2 * HASH + 8, 2 * HASH + 12],
        "itemsize": 2 * HASH + 13,
    }
)
"""A row that may be used. key: its document's place in the order, which is the hash of the group
(also readable as `group`) and then the hash of the exact content. start: where its tokens are.
tokens: their number. splittable: whether they may be cut. The rows of a document are adjacent."""

TAKEN = np.dtype([("index", "i8"), ("tokens", "i8")])
"""The first `tokens` tokens of candidate number `index`."""


@dataclass(frozen=True)
class Split:
    """The held-out and training rows, in order (records of TAKEN).

    reached: the number of candidates, in order, that were used. withheld: the total number of
    tokens in documents with held-out text.
    """

    heldout: Records
    train: Records
    reached: int
    withheld: int


def order_key(seed: int, group: bytes, exact: bytes) -> bytes:
    """A document's place in the order, from the hashes of its group and of its exact content."""
    return hashlib.sha256(b"%d:" % seed + group).digest()[:HASH] + exact[:HASH]


def in_order(candidates: Records) -> NDArray[np.int64]:
    """Indices that sort the candidates by key; rows of a document keep their order."""
    order: NDArray[np.int64] = np.ascontiguousarray(candidates["key"]).argsort(kind="stable")
    return order


def divide(candidates: Records, heldout_tokens: int, train_tokens: int | None) -> Split:
    """Divide the candidates; each side's last text is cut so that its token count is exact.

    A chat row is never cut, so with chats a side can exceed its count by less than one row. A group
    with held-out text is not trained on, not even the part that was cut off. heldout_tokens 0: hold
    nothing out.
    """
    order = in_order(candidates)
    groups, tokens = candidates["group"][order], candidates["tokens"][order]
    before = _tokens_before(tokens)
    starts_group = np.ones(len(order), dtype=bool)
    starts_group[1:] = groups[1:] != groups[:-1]
    borders = np.flatnonzero((before >= heldout_tokens) & starts_group)
    border = int(borders[0]) if len(borders) else len(order)
    heldout = _take(candidates, order[:border], heldout_tokens)
    train = _take(candidates, order[border:], train_tokens)
    return Split(heldout, train, border + len(train), int(tokens[:border].sum(dtype=np.int64)))


def _tokens_before(tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.cumsum(tokens, dtype=np.int64) - tokens.astype(np.int64)


def _take(candidates: Records, order: NDArray[np.int64], limit: int | None) -> Records:
    tokens = candidates["tokens"][order]
    before = _tokens_before(tokens)
    count = len(order) if limit is None else int(np.searchsorted(before, limit))
    taken = np.empty(count, dtype=TAKEN)
    taken["index"], taken["tokens"] = order[:count], tokens[:count]
    if count and limit is not None and candidates["splittable"][order[count - 1]]:
        taken["tokens"][-1] = min(taken["tokens"][-1], limit - before[count - 1])
    return taken


def check_split(
    candidates: Records, split: Split, heldout_tokens: int, train_tokens: int | None
) -> None:
    """Raise DataError if held-out documents use up most of the text."""
    held, train = split.withheld, int(split.train["tokens"].sum())
    if train and train >= min(held, train_tokens or held):
        return
    total = int(candidates["tokens"].sum(dtype=np.int64))
    longest = int(candidates["tokens"].max(initial=0))
    if longest > total / 2:
        problem = "cannot be divided"
        what = f"one document has {longest:,} of the {total:,} tokens, and no document is split"
    else:
        problem = "is too small to divide"
        what = f"{heldout_tokens:,} held-out tokens would use {held:,} of the {total:,} tokens"
    raise DataError(
        f"The text {problem} into training and held-out documents: {what}",
        where="data.heldout_tokens",
        fix="set data.heldout_sources, or lower data.heldout_tokens; if a text file contains many "
        "documents, set documents: blank-line (or line) on its source",
    )
