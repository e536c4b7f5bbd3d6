"""Splits text into training and held-out text that cannot overlap.

Documents are ordered by a hash of the seed and their content, so that the order of files and rows
does not matter. Held-out text is taken from the front of that order, training text after it.
Documents that differ only in whitespace or Unicode form share a hash, form a group, and are never
split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.errors import DataError


@dataclass(frozen=True, order=True)
class OrderKey:
    """The place of a document: by its group, then by its exact content and its row."""

    group: bytes
    exact: bytes
    row: int = 0


@dataclass(frozen=True)
class Candidate:
    """A row that may be used: its place in the order, its tokens, and whether it may be cut."""

    key: OrderKey
    tokens: int
    splittable: bool


@dataclass(frozen=True)
class Taken:
    """The first `tokens` tokens of candidate number `index`."""

    index: int
    tokens: int


@dataclass(frozen=True)
class Split:
    """What each side uses, in order. `reached`: the number of candidates, in order, that were
    used."""

    heldout: list[Taken]
    train: list[Taken]
    reached: int


def order_key(seed: int, group: bytes, exact: bytes, row: int = 0) -> OrderKey:
    shuffled = hashlib.sha256(b"%d:" % seed + group).digest()
    return OrderKey(shuffled, exact, row)


def divide(candidates: Sequence[Candidate], heldout_tokens: int, train_tokens: int | None) -> Split:
    """Divides the candidates; each side's last text is cut so that its token count is exact.

    A chat row is never cut, so with chats a side may exceed its count by less than one row. A group
    with held-out text is not trained on, not even the part that was cut off. heldout_tokens 0:
    everything may be trained on.
    """
    order = sorted(range(len(candidates)), key=lambda index: candidates[index].key)
    border, tokens = 0, 0
    while border < len(order):
        candidate = candidates[order[border]]
        same_group = border > 0 and candidate.key.group == candidates[order[border - 1]].key.group
        if tokens >= heldout_tokens and not same_group:
            break
        tokens += candidate.tokens
        border += 1
    heldout = _take(candidates, order[:border], heldout_tokens)
    train = _take(candidates, order[border:], train_tokens)
    return Split(heldout, train, border + len(train))


def _take(candidates: Sequence[Candidate], order: Sequence[int], limit: int | None) -> list[Taken]:
    taken, total = [], 0
    for index in order:
        candidate = candidates[index]
        room = candidate.tokens if limit is None else limit - total
        if room <= 0:
            break
        tokens = min(candidate.tokens, room) if candidate.splittable else candidate.tokens
        taken.append(Taken(index, tokens))
        total += tokens
    return taken


def check_split(
    candidates: Sequence[Candidate], split: Split, heldout_tokens: int, train_tokens: int | None
) -> None:
    """Raises DataError if held-out documents use up most of the text."""
    held_groups = {candidates[taken.index].key.group for taken in split.heldout}
    held = sum(c.tokens for c in candidates if c.key.group in held_groups)
    train = sum(taken.tokens for taken in split.train)
    if train and train >= min(held, train_tokens or held):
        return
    total = held + sum(c.tokens for c in candidates if c.key.group not in held_groups)
    longest = max((c.tokens for c in candidates), default=0)
    if longest > total / 2:
        what = f"one document is {longest:,} of the {total:,} tokens, and a document is never split"
    else:
        what = f"{heldout_tokens:,} held-out tokens would use {held:,} of the {total:,} tokens"
    raise DataError(
        f"The text cannot be divided into training and held-out documents: {what} between them"
        if longest > total / 2
        else f"The text is too small to divide into training and held-out documents: {what}",
        where="data.heldout_tokens",
        fix="give data.heldout_sources, or lower data.heldout_tokens; if a text file contains many "
        "documents, set documents: blank-line (or line) on its source",
    )
