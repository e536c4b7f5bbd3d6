"""Two tokenizations of the same bytes: where a token of both begins.

Shapes: L tokens of a student's window, M tokens of the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.tokenize_rows import adds_prefix_space, end_of_text, leading_tokens
from stillhouse.data.turn_end import turn_end
from stillhouse.errors import DataError, ModelError
from stillhouse.teachers.text_tokens import Ids, TextTokens

NOWHERE = -1


@dataclass(frozen=True)
class AlignedWindow:
    """A student's window in the teacher's tokens.

    ids_M, positions_M: the teacher's tokens; positions restart at 0 with every document.
    begins_L: the teacher's token that begins where the student's does, and whose prediction is
    comparable; NOWHERE if there is none.
    """

    ids_M: Ids
    positions_M: Ids
    begins_L: Ids


@dataclass(frozen=True)
class _Text:
    """Consecutive tokens of a student's window that are text. start: in the window; skipped: bytes
    before the first complete character."""

    start: int
    ids: Ids
    text: str
    skipped: int


class TokenAligner:
    """Rewrites a student's windows in a teacher's tokens.

    The text between special tokens is decoded to bytes and encoded by the teacher's tokenizer.
    Every document begins as the teacher's tokenizer begins a text, and ends with its EOS. A special
    token becomes the one of the same name, or the one of the same meaning (EOS, end of a turn).

    Raises ModelError: a tokenizer that does not define the bytes of its tokens, or that changes
    text. DataError: a window with a special token that the teacher does not have.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        self.student, self.teacher = TextTokens(student), TextTokens(teacher)
        self.partner = _partners(self.student, self.teacher)
        self._begin_student, self._begin_teacher = (
            leading_tokens(each).astype(np.int64) for each in (student, teacher)
        )
        self._space = 1 if adds_prefix_space(teacher) else 0
        self._special_V = self.student.lengths_V == 0
        _check_bytes(self.student)
        _check_bytes(self.teacher)

    def align(self, ids_RL: Ids, positions_RL: Ids, labels_RL: Ids) -> list[AlignedWindow]:
        """Documents without a label to predict are left out of the teacher's windows."""
        windows = [self._parts(*row) for row in zip(ids_RL, positions_RL, labels_RL, strict=True)]
        texts = [part for parts in windows for part in parts if isinstance(part, _Text)]
        encoded = iter(self.teacher.encode([part.text for part in texts]))
        return [
            self._window(parts, encoded, len(ids_L))
            for parts, ids_L in zip(windows, ids_RL, strict=True)
        ]

    def _parts(self, ids_L: Ids, positions_L: Ids, labels_L: Ids) -> list[_Text | tuple[int, Ids]]:
        """The window's texts and, between them, the teacher's special tokens with the place of the
        student's; NOWHERE begins a document."""
        parts: list[_Text | tuple[int, Ids]] = []
        starts = np.flatnonzero(positions_L == 0)
        for start, stop in zip(starts, [*starts[1:], len(ids_L)], strict=True):
            if (labels_L[start + 1 : stop] < 0).all():
                continue
            parts.append((NOWHERE, self._begin_teacher))
            begin = len(self._begin_student)
            led = begin and np.array_equal(ids_L[start : start + begin], self._begin_student)
            at = start + (begin if led else 0)
            edges = np.flatnonzero(np.diff(self._special_V[ids_L[at:stop]])) + at + 1
            for first, last in zip([at, *edges], [*edges, stop], strict=True):
                if not self._special_V[ids_L[first]]:
                    parts.append(self._text(first, ids_L[first:last]))
                    continue
                for place in range(first, last):
                    parts.append((place, np.array([self._special(int(ids_L[place]))])))
        return parts

    def _special(self, id: int) -> int:
        if id in self.partner:
            return self.partner[id]
        name = self.student.special.get(id, f"id {id}")
        raise DataError(
            f"the teacher's tokenizer has no token for {name}, which the student's text holds",
            where=f"the tokenizer of {self.teacher.name}",
            fix="train on plain text, or choose a teacher whose chat template has the same tokens",
        )

    def _text(self, start: int, ids: Ids) -> _Text:
        """A window may begin or end inside a character."""
        data = self.student.decode(ids)
        skipped = 0
        while skipped < min(3, len(data)) and 0x80 <= data[skipped] < 0xC0:
            skipped += 1
        try:
            text = data[skipped:].decode()
        except UnicodeDecodeError as error:
            # The bytes after a cut character, if it is the last, are left out.
            text = data[skipped : skipped + error.start].decode()
        return _Text(start, ids, text, skipped)

    def _window(
        self, parts: Sequence[_Text | tuple[int, Ids]], encoded: Iterator[Ids], length: int
    ) -> AlignedWindow:
        begins_L = np.full(length, NOWHERE)
        documents: list[list[Ids]] = []
        done = 0
        for part in parts:
            if isinstance(part, _Text):
                ids = next(encoded)
                self._match(part, ids, begins_L, done)
            else:
                place, ids = part
                if place == NOWHERE:
                    documents.append([])
                else:
                    begins_L[place] = done
            documents[-1].append(ids)
            done += len(ids)
        whole = [np.concatenate(document) for document in documents]
        positions = [np.arange(len(ids)) for ids in whole]
        ids_M, positions_M = (
            np.concatenate([np.empty(0, np.int64), *each]) for each in (whole, positions)
        )
        # The first token of a document is not predicted.
        found = begins_L[begins_L >= 0]
        begins_L[begins_L >= 0] = np.where(positions_M[found] > 0, found, NOWHERE)
        return AlignedWindow(ids_M, positions_M, begins_L)

    def _match(self, part: _Text, ids: Ids, begins_L: Ids, done: int) -> None:
        """Fill in where the text's tokens of both tokenizers begin at the same byte."""
        ours_L = _starts(self.student.lengths_V[part.ids])
        theirs_M = _starts(self.teacher.lengths_V[ids]) + part.skipped - self._space
        if self._space:
            theirs_M = theirs_M[1:]  # the first token holds a space that is not in the text
        at_L = np.searchsorted(theirs_M, ours_L).clip(max=max(0, len(theirs_M) - 1))
        if not len(theirs_M):
            return
        end = part.skipped + len(part.text.encode())
        same_L = (theirs_M[at_L] == ours_L) & (ours_L < end)
        same_L &= self.student.lengths_V[part.ids] > 0
        begins_L[part.start : part.start + len(ours_L)] = np.where(
            same_L, at_L + done + self._space, NOWHERE
        )


def require_alignable(student: Any, teacher: Any) -> None:
    """Raise ModelError if texts of one tokenizer cannot be aligned with the other's tokens."""
    for tokenizer in (student, teacher):
        _check_bytes(TextTokens(tokenizer))


def _starts(lengths_L: NDArray[np.int64]) -> Ids:
    return np.cumsum(lengths_L) - lengths_L


def _partners(student: TextTokens, teacher: TextTokens) -> dict[int, int]:
    """The teacher's token for each of the student's special tokens that has one, EOS first."""
    names = {name: id for id, name in teacher.special.items()}
    same = {id: names[name] for id, name in student.special.items() if name in names}
    tokenizers = student.tokenizer, teacher.tokenizer
    ends = [(turn_end(each), end_of_text(each)) for each in tokenizers]
    (our_turn, our_end), (their_turn, their_end) = ends
    found = {our_end: same.get(our_end, their_end), **same}
    if our_turn is not None and their_turn is not None:
        found.setdefault(our_turn.id, their_turn.id)
    return found


def _check_bytes(tokens: TextTokens) -> None:
    """Raise ModelError if the tokenizer changes text: its tokens do not hold the text's bytes."""
    text = "A résumé; don't, 12 345\n\n\tnaïve  Ünïcode 漢字 🙂"
    (ids,) = tokens.encode([text])
    unknown = any(int(id) not in tokens.strings for id in ids)
    if unknown or tokens.decode(ids).removeprefix(b" ") != text.encode():
        raise ModelError(
            "the tokenizer changes text before it encodes it, so its tokens cannot be aligned with "
            "those of another tokenizer",
            where=f"the tokenizer of {tokens.name}",
            fix="choose models with byte-level tokenizers, or with byte fallback and no "
            "normalization; or train the student on text that the teacher wrote",
        )
