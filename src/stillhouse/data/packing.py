"""Places rows in windows of a fixed length.

Shapes: R windows, L tokens in a window (the context). labels_RL[r, t] is the token at t where it
is to be predicted, otherwise -100; the shift is made in `data.shift`. position_ids_RL restart at 0
with every segment, which is how transformers (without an attention mask) keeps segments from
attending to each other: see `find_packed_sequence_indices` in its masking_utils. Padding is its own
segment.

The plan is greedy: a window takes the longest unsplittable row that fits, again and again
(first-fit decreasing, at most 11/9 of the fewest windows + 1); what is left of it takes the
longest piece of text that fits, and finally a part of one. Documents are not split if possible, and
windows are full nevertheless.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.shift import IGNORED


def smallest_part(context: int) -> int:
    """A text is not cut to fill fewer tokens: they would be trained on almost without context."""
    return max(2, min(16, context // 16))


@dataclass(frozen=True)
class Segment:
    """Tokens [start, start + length) of one row."""

    row: int
    start: int
    length: int


Plan = list[list[Segment]]
"""The segments of every window."""


class _ByLength:
    """Pieces to place; pops the longest one of at most a given length."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.pieces: dict[int, list[Segment]] = {}

    def add(self, piece: Segment) -> None:
        if piece.length not in self.pieces:
            bisect.insort(self.lengths, piece.length)
            self.pieces[piece.length] = []
        self.pieces[piece.length].append(piece)

    def pop(self, most: int) -> Segment | None:
        at = bisect.bisect_right(self.lengths, most) - 1
        if at < 0:
            return None
        length = self.lengths[at]
        piece = self.pieces[length].pop()
        if not self.pieces[length]:
            del self.pieces[length], self.lengths[at]
        return piece

    def __bool__(self) -> bool:
        return bool(self.lengths)


def plan_isolated(lengths: Sequence[int], splittable: Sequence[bool], context: int) -> Plan:
    """Windows that documents share. Every token of every row is placed exactly once.

    Rows that are not splittable must be at most `context` long.
    """
    whole, text = _ByLength(), _ByLength()
    for row in reversed(range(len(lengths))):  # pop() removes the last: rows stay in order
        if splittable[row]:
            for piece in _chunks(row, lengths[row], context):
                text.add(piece)
        else:
            assert lengths[row] <= context
            whole.add(Segment(row, 0, lengths[row]))
    plan: Plan = []
    while whole or text:
        plan.append(_fill(whole, text, context, smallest_part(context)))
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
    """One row, or one piece of a long text, per window."""
    assert all(n <= context or cut for n, cut in zip(lengths, splittable, strict=True))
    return [
        [piece] for row, length in enumerate(lengths) for piece in _chunks(row, length, context)
    ]


def _chunks(row: int, length: int, context: int) -> list[Segment]:
    starts = range(0, length, context)
    return [Segment(row, start, min(context, length - start)) for start in starts]


@dataclass(frozen=True)
class Window:
    """One window, [L] each."""

    input_ids_L: NDArray[np.int32]
    labels_L: NDArray[np.int32]
    position_ids_L: NDArray[np.int32]


def fill_windows(
    plan: Plan,
    ids: Sequence[NDArray[np.int32]],
    supervised: Sequence[NDArray[np.bool_]],
    context: int,
    pad_id: int,
) -> Iterator[Window]:
    """The windows of a plan, one at a time. `ids` and `supervised` have one array per row."""
    for segments in plan:
        input_ids_L = np.full(context, pad_id, dtype=np.int32)
        labels_L = np.full(context, IGNORED, dtype=np.int32)
        position_ids_L = np.zeros(context, dtype=np.int32)
        end = 0
        for segment in segments:
            part = slice(segment.start, segment.start + segment.length)
            tokens = ids[segment.row][part]
            labels = np.where(supervised[segment.row][part], tokens, IGNORED)
            labels[0] = IGNORED  # nothing in the segment precedes it
            here = slice(end, end + segment.length)
            input_ids_L[here], labels_L[here] = tokens, labels
            position_ids_L[here] = np.arange(segment.length)
            end += segment.length
        position_ids_L[end:] = np.arange(context - end)
        yield Window(input_ids_L, labels_L, position_ids_L)
