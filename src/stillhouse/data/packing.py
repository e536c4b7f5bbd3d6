"""Places rows in windows of a fixed length.

Shapes: R windows, L tokens in a window (the context). labels_RL[r, t] is the token at t if it is
supervised, otherwise -100; `data.shift` shifts the labels. position_ids_RL restart at 0 with every
segment: this is how transformers, without an attention mask, keeps segments from attending to each
other (see `find_packed_sequence_indices` in its masking_utils). Padding is a separate segment.

The plan is greedy. A window first takes the longest unsplittable rows that fit (first-fit
decreasing, which needs at most 11/9 of the optimal number of windows + 1), then the longest pieces
of text that fit, and finally a part of a piece. Windows are full, and few documents are split.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.shift import IGNORED


def smallest_part(context: int) -> int:
    """The fewest tokens that a text is cut to fill: shorter parts would have almost no context."""
    return max(2, min(16, context // 16))


def most_windows(tokens: int, context: int, *, packed: bool, splittable: bool) -> int:
    """Upper bound on the number of windows that this many tokens fill.

    splittable: every row is splittable. Then every window but the last has fewer than
    `smallest_part` tokens of padding. Otherwise, any two windows together have more than `context`
    tokens, since no row of the later window fits into the earlier one; and the last row may exceed
    `tokens`.
    """
    if not packed:
        return tokens
    if splittable:
        return -(-tokens // (context - smallest_part(context) + 1))
    return 2 * (tokens + context - 1) // context + 1


class Segment(NamedTuple):
    """Tokens [start, start + length) of one row."""

    row: int
    start: int
    length: int


class Plan:
    """The segments of every window, stored in columns of 20 bytes per segment, because there can be
    hundreds of millions."""

    def __init__(self) -> None:
        self._rows, self._starts, self._lengths = array("q"), array("q"), array("i")
        self._ends = array("q", [0])

    def add(self, window: Sequence[Segment]) -> None:
        for row, start, length in window:
            self._rows.append(row)
            self._starts.append(start)
            self._lengths.append(length)
        self._ends.append(len(self._rows))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, window: int) -> list[Segment]:
        part = slice(self._ends[window], self._ends[window + 1])
        columns = (self._rows[part], self._starts[part], self._lengths[part])
        return list(map(Segment, *columns))

    def __iter__(self) -> Iterator[list[Segment]]:
        return (self[window] for window in range(len(self)))


class _ByLength:
    """Pieces to place; pops the longest one of at most a given length."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.pieces: dict[int, tuple[array[int], array[int]]] = {}

    def add(self, piece: Segment) -> None:
        if piece.length not in self.pieces:
            bisect.insort(self.lengths, piece.length)
            self.pieces[piece.length] = array("q"), array("q")
        rows, starts = self.pieces[piece.length]
        rows.append(piece.row)
        starts.append(piece.start)

    def pop(self, most: int) -> Segment | None:
        at = bisect.bisect_right(self.lengths, most) - 1
        if at < 0:
            return None
        length = self.lengths[at]
        rows, starts = self.pieces[length]
        piece = Segment(rows.pop(), starts.pop(), length)
        if not rows:
            del self.pieces[length], self.lengths[at]
        return piece

    def __bool__(self) -> bool:
        return bool(self.lengths)


def plan_isolated(lengths: Sequence[int], splittable: Sequence[bool], context: int) -> Plan:
    """Plan windows that documents share. Every token of every row is placed exactly once.

    Rows that are not splittable must have at most `context` tokens.
    """
    whole, text = _ByLength(), _ByLength()
    for row in reversed(range(len(lengths))):  # pop() removes the last: rows stay in order
        if splittable[row]:
            for piece in _chunks(row, lengths[row], context):
                text.add(piece)
        else:
            assert lengths[row] <= context
            whole.add(Segment(row, 0, lengths[row]))
    plan = Plan()
    while whole or text:
        plan.add(_fill(whole, text, context, smallest_part(context)))
    return plan


def _fill(whole: _ByLength, text: _ByLength, room: int, smallest: int) -> list[Segment]:
    window: list[Segment] = []
    for pieces in (whole, text):
        while (piece := pieces.pop(room)) is not None:
            window.append(piece)
            room -= piece.length
    if room >= smallest and text:
        longer = text.pop(text.lengths[-1])  # everything left is longer than the remaining space
        assert longer is not None
        window.append(Segment(longer.row, longer.start, room))
        text.add(Segment(longer.row, longer.start + room, longer.length - room))
    return window


def plan_single(lengths: Sequence[int], splittable: Sequence[bool], context: int) -> Plan:
    """Plan windows with one row, or one piece of a long text, each."""
    assert all(n <= context or cut for n, cut in zip(lengths, splittable, strict=True))
    plan = Plan()
    for row, length in enumerate(lengths):
        for piece in _chunks(row, length, context):
            plan.add([piece])
    return plan


def _chunks(row: int, length: int, context: int) -> Iterator[Segment]:
    for start in range(0, length, context):
        yield Segment(row, start, min(context, length - start))


Window = dict[str, NDArray[np.int32]]
"""The arrays of one window, [L] each: input_ids, labels, and position_ids."""


def fill_windows(
    plan: Iterable[Sequence[Segment]],
    read: Callable[[Segment], tuple[NDArray[np.int32], NDArray[np.bool_]]],
    context: int,
    pad_id: int,
) -> Iterator[Window]:
    """Yield the windows of a plan. read: returns the token ids of a segment and its loss mask."""
    for segments in plan:
        input_ids_L = np.full(context, pad_id, dtype=np.int32)
        labels_L = np.full(context, IGNORED, dtype=np.int32)
        position_ids_L = np.zeros(context, dtype=np.int32)
        end = 0
        for segment in segments:
            tokens, supervised = read(segment)
            labels = np.where(supervised, tokens, IGNORED)
            labels[0] = IGNORED  # nothing in the segment precedes it
            here = slice(end, end + segment.length)
            input_ids_L[here], labels_L[here] = tokens, labels
            position_ids_L[here] = np.arange(segment.length)
            end += segment.length
        position_ids_L[end:] = np.arange(context - end)
        yield {"input_ids": input_ids_L, "labels": labels_L, "position_ids": position_ids_L}
