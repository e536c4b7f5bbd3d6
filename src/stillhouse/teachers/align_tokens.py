"""Alignment of two tokenizations of the same bytes: the places where both begin a token.

Shapes: L tokens of a student's window, M tokens of the teacher's, C chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.chat_frames import Part, chat_frames
from stillhouse.data.tokenize_rows import (
    adds_prefix_space,
    encode_texts,
    end_of_text,
    leading_tokens,
)
from stillhouse.data.turn_end import turn_end
from stillhouse.errors import DataError, ModelError
from stillhouse.teachers.roots import Roots, make_roots
from stillhouse.teachers.text_tokens import Ids, TextTokens

NOWHERE = -1


@dataclass(frozen=True)
class AlignedWindow:
    """A student's window in the teacher's tokens.

    ids_M, positions_M: the teacher's tokens; positions restart at 0 with every document.
    begins_L: for each of the student's tokens, the index of the teacher's token that begins at the
    same byte and whose prediction is comparable; NOWHERE if there is none.
    changed: number of texts that the teacher's tokenizer alters (by NFC normalization, for
    example), so that nothing in them can be compared.
    """

    ids_M: Ids
    positions_M: Ids
    begins_L: Ids
    changed: int = 0


@dataclass(frozen=True)
class Chunks:
    """Spans of a window between neighboring shared boundaries, all of whose tokens are supervised.

    student_C2, teacher_C2: the first token of each chunk and the one after its last, as indices
    into the student's and the teacher's window.
    """

    student_C2: Ids
    teacher_C2: Ids

    def of_several_tokens(self) -> Chunks:
        """The chunks in which the student or the teacher has more than one token."""
        ours, theirs = self.student_C2, self.teacher_C2
        several_C = (np.diff(ours) > 1)[:, 0] | (np.diff(theirs) > 1)[:, 0]
        return Chunks(ours[several_C], theirs[several_C])


def places_in(chunks_C2: Ids) -> tuple[Ids, Ids]:
    """The indices of all tokens in one side's chunks, and the chunk that each belongs to."""
    start_C, count_C = chunks_C2[:, 0], np.diff(chunks_C2)[:, 0]
    chunk_P = np.repeat(np.arange(len(count_C)), count_C)
    before_C = np.cumsum(count_C) - count_C
    return start_C[chunk_P] + np.arange(len(chunk_P)) - before_C[chunk_P], chunk_P


@dataclass(frozen=True)
class _Text:
    """A text that the teacher's tokenizer encodes separately.

    start: the index of its first token in the student's window. ids: the student's tokens; empty if
    none are to be matched. skipped: bytes before the first complete character.
    """

    start: int
    ids: Ids
    text: str
    skipped: int = 0


@dataclass(frozen=True)
class _Given:
    """Tokens of the teacher that are not encoded from text.

    place: the student's token that begins there; NOWHERE if there is none. first: whether they
    begin a document.
    """

    ids: Ids
    place: int = NOWHERE
    first: bool = False


_Part = _Text | _Given


class TokenAligner:
    """Rewrites a student's windows in a teacher's tokens.

    The text between special tokens is decoded to bytes and encoded by the teacher's tokenizer.
    Every document begins as the teacher's tokenizer begins a text, and ends with its EOS. A special
    token is replaced by the teacher's token with the same name or the same meaning (EOS, end of
    turn). A chat whose special tokens the teacher lacks is rendered with the teacher's chat
    template, and the answers are matched.

    Raises ModelError: a tokenizer that does not define the bytes of its tokens, or that alters
    text. DataError: a row that has special tokens the teacher lacks and is not a plain chat.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        self.student, self.teacher = TextTokens(student), TextTokens(teacher)
        self.partners = _partners(self.student, self.teacher)
        self._partner = dict(reversed(self.partners))
        self._begin_student, self._begin_teacher = (
            leading_tokens(each).astype(np.int64) for each in (student, teacher)
        )
        self._space = 1 if adds_prefix_space(teacher) else 0
        self._special_V = self.student.lengths_V == 0
        self._unknown_V = self._special_V.copy()
        self._unknown_V[list(self._partner)] = False
        self._frames = chat_frames(student), chat_frames(teacher)
        self._frame_tokens = lru_cache(maxsize=256)(partial(_with_special_tokens, teacher))
        _check_bytes(self.student)
        _check_bytes(self.teacher)

    def roots(self) -> Roots:
        """The roots of both vocabularies before any text is seen."""
        return make_roots(self.student, self.teacher, self.partners)

    def align(
        self, ids_RL: Ids, positions_RL: Ids, labels_RL: Ids, *, skip_unreadable: bool = False
    ) -> list[AlignedWindow]:
        """Rewrite windows in the teacher's tokens, without documents that have no labels.

        skip_unreadable: leave out documents that would otherwise raise DataError.
        """
        rows = zip(ids_RL, positions_RL, labels_RL, strict=True)
        windows = [self._parts(*row, skip_unreadable=skip_unreadable) for row in rows]
        texts = [part for parts in windows for part in parts if isinstance(part, _Text)]
        encoded = iter(self.teacher.encode([part.text for part in texts]))
        return [
            self._window(parts, encoded, len(ids_L))
            for parts, ids_L in zip(windows, ids_RL, strict=True)
        ]

    def require_readable(self, ids_RL: Ids, positions_RL: Ids, labels_RL: Ids) -> None:
        """Raise DataError if a chat cannot be rendered with the teacher's template."""
        for ids_L, positions_L, labels_L in zip(ids_RL, positions_RL, labels_RL, strict=True):
            if self._unknown_V[ids_L].any():
                self._parts(ids_L, positions_L, labels_L, skip_unreadable=False)

    def chunks(
        self, window: AlignedWindow, ids_L: Ids, positions_L: Ids, supervised_L: NDArray[np.bool_]
    ) -> Chunks:
        """The chunks of a student's window that `align` rewrote as `window`.

        Each special token is a chunk. Text that the window's end cuts off before a shared boundary
        is in no chunk.
        """
        start_C = np.flatnonzero(window.begins_L >= 0)
        begin_C = window.begins_L[start_C]
        special_C = self._special_V[ids_L[start_C]]
        stop_C, end_C = (
            np.where(special_C, each_C + 1, np.append(each_C[1:], each_C[-1:]))
            for each_C in (start_C, begin_C)
        )
        ours_L, theirs_M = (
            np.cumsum([0, *tokens.lengths_V[ids]])
            for tokens, ids in ((self.student, ids_L), (self.teacher, window.ids_M))
        )
        document_L = np.cumsum(positions_L == 0)
        before_L = np.cumsum([0, *supervised_L])
        # Bytes differ where some were left out, as after a cut character.
        same_C = ours_L[stop_C] - ours_L[start_C] == theirs_M[end_C] - theirs_M[begin_C]
        same_C &= special_C | (document_L[start_C] == document_L[stop_C.clip(max=len(ids_L) - 1)])
        same_C &= before_L[stop_C] - before_L[start_C] == stop_C - start_C
        same_C &= stop_C > start_C
        pairs = (start_C, stop_C), (begin_C, end_C)
        return Chunks(*(np.stack(pair, axis=1)[same_C] for pair in pairs))

    def _parts(
        self, ids_L: Ids, positions_L: Ids, labels_L: Ids, *, skip_unreadable: bool
    ) -> list[_Part]:
        parts: list[_Part] = []
        starts = np.flatnonzero(positions_L == 0)
        for start, stop in zip(starts, [*starts[1:], len(ids_L)], strict=True):
            if not (labels_L[start + 1 : stop] >= 0).any():
                continue
            try:
                parts += self._document(int(start), ids_L[start:stop])
            except DataError:
                if not skip_unreadable:
                    raise
        return parts

    def _document(self, start: int, ids_L: Ids) -> list[_Part]:
        begin = len(self._begin_student)
        led = begin if np.array_equal(ids_L[:begin], self._begin_student) else 0
        special_L = self._special_V[ids_L]
        unknown = ids_L[led:][self._unknown_V[ids_L[led:]]]
        if len(unknown):
            return self._chat(start, ids_L, int(unknown[0]))
        parts: list[_Part] = [_Given(self._begin_teacher, first=True)]
        edges = np.flatnonzero(np.diff(special_L[led:])) + led + 1
        for first, last in zip([led, *edges], [*edges, len(ids_L)], strict=True):
            if not special_L[first]:
                parts.append(self._text(start + first, ids_L[first:last]))
                continue
            for place in range(first, last):
                parts.append(_Given(np.array([self._partner[int(ids_L[place])]]), start + place))
        return parts

    def _chat(self, start: int, ids_L: Ids, unknown: int) -> list[_Part]:
        """A chat in the teacher's template. unknown: a special token that the teacher lacks."""
        ours, theirs = self._frames
        strings = [self.student.strings.get(id, b"") for id in ids_L.tolist()]
        named = [
            string or self.student.special.get(id, "").encode()
            for id, string in zip(ids_L.tolist(), strings, strict=True)
        ]
        text = b"".join(named).decode(errors="ignore")
        plain = b"".join(string or b"\0" for string in strings).decode(errors="replace")
        parsed = None
        if ours and theirs and not any(name in plain for name in self.student.special.values()):
            parsed = ours.parse(text)
        written = theirs.write(parsed) if parsed and theirs else None
        if parsed is None or written is None:
            raise DataError(
                f"the teacher's tokenizer has no token for {self.student.special.get(unknown)}, "
                "and the row is not a chat that the teacher's template renders with the same "
                f"contents: {text[:80]!r}",
                where=f"the tokenizer of {self.teacher.name}",
                fix="remove such rows, train on plain text, or choose a teacher whose chat "
                "template has the same tokens",
            )
        begins = _starts(np.array([len(name) for name in named]))
        return list(self._answers(start, ids_L, begins, parsed, written))

    def _answers(
        self, start: int, ids_L: Ids, begins: Ids, parsed: Sequence[Part], written: Sequence[Part]
    ) -> Iterator[_Part]:
        """The teacher's parts of a chat. Answers, and the tokens that end them, are matched."""
        edges = pairwise(accumulate((len(part.text.encode()) for part in parsed), initial=0))
        contents = (edge for edge, part in zip(edges, parsed, strict=True) if part.role is not None)
        ended = NOWHERE
        for number, part in enumerate(written):
            if part.role is None:
                tokens = self._frame_tokens(part.text)
                both = (int(ids_L[ended - start]), int(tokens[0])) if ended >= 0 else None
                place = ended if both in self.partners else NOWHERE
                yield _Given(tokens, place, first=number == 0)
                ended = NOWHERE
                continue
            low, high = next(contents)
            first, last = np.searchsorted(begins, [low, high])
            if part.role != "assistant" or not part.text:
                yield _Text(start, ids_L[:0], part.text)
                continue
            yield _Text(start + int(first), ids_L[first:last], part.text)
            ended = start + int(last) if last < len(ids_L) else NOWHERE

    def _text(self, start: int, ids: Ids) -> _Text:
        """Decode the tokens of a text. A window can begin or end inside a character."""
        data = self.student.decode(ids)
        skipped = 0
        while skipped < min(3, len(data)) and 0x80 <= data[skipped] < 0xC0:
            skipped += 1
        try:
            text = data[skipped:].decode()
        except UnicodeDecodeError as error:
            # Leave out the bytes from an incomplete last character on.
            text = data[skipped : skipped + error.start].decode()
        return _Text(start, ids, text, skipped)

    def _window(self, parts: Sequence[_Part], encoded: Iterator[Ids], length: int) -> AlignedWindow:
        begins_L = np.full(length, NOWHERE)
        documents: list[list[Ids]] = []
        done = changed = 0
        for part in parts:
            if isinstance(part, _Text):
                ids = next(encoded)
                changed += not self._match(part, ids, begins_L, done)
            else:
                ids = part.ids
                if part.first:
                    documents.append([])
                if part.place != NOWHERE:
                    begins_L[part.place] = done
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
        return AlignedWindow(ids_M, positions_M, begins_L, changed)

    def _match(self, part: _Text, ids: Ids, begins_L: Ids, done: int) -> bool:
        """Fill in `begins_L` where tokens of both tokenizers begin at the same byte of the text.

        Returns False, and fills in nothing, if the teacher's tokens do not decode to the text.
        """
        text, strings = part.text.encode(), self.teacher.strings
        written = b"".join([strings.get(id, b"") for id in ids.tolist()])
        space = len(written) - len(text)
        if space not in (0, self._space) or written[space:] != text:
            return False
        ours_L = _starts(self.student.lengths_V[part.ids])
        theirs_M = _starts(self.teacher.lengths_V[ids]) + part.skipped - space
        if space:
            theirs_M = theirs_M[1:]  # the first token contains a space that is not in the text
        at_L = np.searchsorted(theirs_M, ours_L)
        same_L = np.append(theirs_M, NOWHERE)[at_L] == ours_L
        same_L &= ours_L < part.skipped + len(text)
        same_L &= self.student.lengths_V[part.ids] > 0
        begins_L[part.start : part.start + len(ours_L)] = np.where(
            same_L, at_L + done + space, NOWHERE
        )
        return True


def require_alignable(student: Any, teacher: Any) -> None:
    """Raise ModelError if texts of one tokenizer cannot be aligned with the other's tokens."""
    for tokenizer in (student, teacher):
        _check_bytes(TextTokens(tokenizer))


def _starts(lengths_L: NDArray[np.int64]) -> Ids:
    return np.cumsum(lengths_L) - lengths_L


def _with_special_tokens(tokenizer: Any, text: str) -> Ids:
    """The tokens of a chat template's output."""
    return np.asarray(encode_texts([text], tokenizer)[0], dtype=np.int64)


def _partners(student: TextTokens, teacher: TextTokens) -> tuple[tuple[int, int], ...]:
    """Pairs (student, teacher) of special tokens that mean the same: EOS first, then tokens with
    the same name, then the end of a turn. A token can be in several pairs."""
    names = {name: id for id, name in teacher.special.items()}
    same = {id: names[name] for id, name in student.special.items() if name in names}
    tokenizers = student.tokenizer, teacher.tokenizer
    ends = [(turn_end(each), end_of_text(each)) for each in tokenizers]
    (our_turn, our_end), (their_turn, their_end) = ends
    pairs = [(our_end, same.get(our_end, their_end)), *same.items()]
    if our_turn is not None and their_turn is not None and our_turn.id not in same:
        pairs.append((our_turn.id, their_turn.id))
    return tuple(dict.fromkeys(pairs))


def _check_bytes(tokens: TextTokens) -> None:
    """Raise ModelError if the tokenizer alters text: its tokens do not decode to the same bytes."""
    text = "A résumé; don't, 12 345\n\n\tnaïve  Ünïcode 漢字 🙂"
    (ids,) = tokens.encode([text])
    unknown = any(int(id) not in tokens.strings for id in ids)
    if unknown or tokens.decode(ids).removeprefix(b" ") != text.encode():
        raise ModelError(
            "the tokenizer changes text before it encodes it, so its tokens cannot be aligned with "
            "another tokenizer's",
            where=f"the tokenizer of {tokens.name}",
            fix="choose models with byte-level tokenizers, or with byte fallback and no "
            "normalization; or train the student on text that the teacher generated",
        )
