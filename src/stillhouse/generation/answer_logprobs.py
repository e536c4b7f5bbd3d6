"""The log-probabilities of an API's answers, as a signal for the student's tokens.

An answer's tokens match the student's if both have the same bytes and the same boundaries. Each
token then has the distribution that the API returned: the k most probable tokens, and a tail with
the mass of all others. Tokens without one (mostly the end of the turn, which few servers report,
and turns in the prompt) are trained on as they are: all mass is on the token that is there. For a
token that the teacher sampled at temperature 1, this is right on average.

Shapes: N supervised tokens of a row, E entries of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from stillhouse.data.tokenize_rows import TokenRow
from stillhouse.errors import SignalError
from stillhouse.generation.request import Answer, are_logprobs, is_logprob
from stillhouse.signals.encode import Statistics
from stillhouse.signals.encoded_rows import EntryRows, split_ids
from stillhouse.teachers.text_tokens import token_bytes

LEAST = float(np.finfo(np.float16).min)
OVER_ONE = 1e-3
"""How much the probabilities of a token may exceed 1, because they are rounded."""

Entries = dict[int, float]
"""Log-probabilities by token id, of one position."""


@dataclass(frozen=True)
class ByteVocabulary:
    """A tokenizer's tokens as bytes. id_of: by all their bytes. shown_id_of: by the text that is
    left if a server drops bytes that are not a complete character. Tokens that share a key are
    ambiguous: they have no id there, and stay in the tail."""

    bytes_of: Mapping[int, bytes]
    id_of: Mapping[bytes, int]
    shown_id_of: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int) -> ByteVocabulary:
        bytes_of = {i: found for i, found in token_bytes(tokenizer).items() if i < vocabulary}
        shown = ((_shown(found), i) for i, found in bytes_of.items())
        return cls(bytes_of, _unique((found, i) for i, found in bytes_of.items()), _unique(shown))


K = TypeVar("K")


def _unique(pairs: Iterable[tuple[K, int]]) -> dict[K, int]:
    found: dict[K, int] = {}
    twice: set[K] = set()
    for key, i in pairs:
        if key in found:
            twice.add(key)
        found[key] = i
    return {key: i for key, i in found.items() if key not in twice}


def _shown(token: bytes) -> str:
    return token.decode("utf-8", "ignore")


@dataclass(frozen=True)
class Aligned:
    """entries: one for each supervised token of the row, the most probable first. reported: whether
    the API returned them. matched: whether the answer's tokens are the student's."""

    entries: list[Entries]
    reported: list[bool]
    matched: bool

    def first(self, kept: int) -> Aligned:
        """Of the first tokens only."""
        return Aligned(self.entries[:kept], self.reported[:kept], self.matched)


def align(
    row: TokenRow, text: str, logprobs: Sequence[Any] | None, k: int, vocabulary: ByteVocabulary
) -> Aligned:
    """The signal of a row whose last turn is `text`. logprobs: as the API gave them for the
    complete answer, of which `text` is the last part; malformed ones, which an older journal may
    have, count as not reported. Raises SignalError: probabilities of more than 1."""
    supervised = np.flatnonzero(row.supervised)
    supervised = supervised[supervised > 0]
    ids = row.ids[supervised].tolist()
    entries: list[Entries] = [{i: 0.0} for i in ids]
    found = _places(
        row, supervised, text, [sound_position(one) for one in logprobs or []], vocabulary
    )
    reported = [False] * len(ids)
    for place, position in found:
        distribution = _entries(position, ids[place], k, vocabulary)
        if distribution:
            entries[place] = distribution
            reported[place] = True
    return Aligned(entries, reported, bool(found))


def sound_position(position: Any) -> Mapping[str, Any]:
    """The position; for a malformed one only its token's text."""
    if are_logprobs([position]):
        return position
    return {"token": position.get("token") if isinstance(position, dict) else None}


def _places(
    row: TokenRow, supervised: Any, text: str, logprobs: Sequence[Any], vocabulary: ByteVocabulary
) -> list[tuple[int, Any]]:
    """The supervised tokens that the API's positions are about; empty if they do not match."""
    turn = last_turn(supervised)
    ours = [vocabulary.bytes_of.get(i, b"") for i in row.ids[supervised[turn:]].tolist()]
    at, end = _span(ours, text.encode())
    for first in range(len(logprobs) - (end - at), -1, -1) if at < end else ():
        last = first + end - at
        if all(map(_is_token, logprobs[first:last], ours[at:end])):
            places = [(turn + at + n, logprobs[first + n]) for n in range(end - at)]
            if end < len(ours) and last < len(logprobs) and _is_token(logprobs[last], ours[end]):
                places.append((turn + end, logprobs[last]))  # the end of the turn too
            return places
    return []


def last_turn(supervised: Any) -> int:
    """The first of the supervised tokens that follow one another to the end. supervised: their
    places in the row."""
    turn = len(supervised) - 1
    while turn > 0 and supervised[turn - 1] == supervised[turn] - 1:
        turn -= 1
    return max(turn, 0)


def _span(tokens: Sequence[bytes], text: bytes) -> tuple[int, int]:
    """The tokens that are exactly this text; (0, 0) if there are none."""
    start = b"".join(tokens).find(text)
    offsets = [0, *accumulate(map(len, tokens))]
    if not text or start not in offsets or start + len(text) not in offsets:
        return 0, 0
    return offsets.index(start), offsets.index(start + len(text))


def _is_token(position: Any, token: bytes) -> bool:
    """Whether a position is about these bytes. A server that returns only text cannot show bytes
    that are not a complete character: then the rest of the token is compared."""
    known = given_bytes(position)
    if known is not None:
        return known == token
    return position.get("token") in (_shown(token), token.decode("utf-8", "replace"))


def given_bytes(position: Any) -> bytes | None:
    """The bytes that the server returns for a position's or an alternative's token."""
    given = position.get("bytes")
    return bytes(given) if isinstance(given, list) and given else None


def _entries(position: Any, own: int, k: int, vocabulary: ByteVocabulary) -> Entries:
    """The k most probable tokens of the position that the tokenizer has.

    own: the token that was written there.
    """
    ranked = sorted(position.get("top_logprobs") or [], key=lambda one: -float(one["logprob"]))
    found: Entries = {}
    for one in ranked[:k]:
        token = _token_id(one, vocabulary)
        if (one["token"], one["logprob"]) == (position.get("token"), position.get("logprob")):
            token = own
        if token is not None and token not in found:
            found[token] = max(float(one["logprob"]), LEAST)
    mass = sum(map(math.exp, found.values()))
    if not mass <= 1.0 + OVER_ONE:
        raise SignalError(
            f"the API's log-probabilities of the token {position.get('token')!r} have a mass of "
            f"{mass:.4f}",
            where="signals.answers",
            fix="the server must return log-probabilities from before sampling; or remove "
            "signals.answers",
        )
    return found


def _token_id(alternative: Any, vocabulary: ByteVocabulary) -> int | None:
    known = given_bytes(alternative)
    if known is not None:
        return vocabulary.id_of.get(known)
    return vocabulary.shown_id_of.get(alternative["token"])


def entry_rows(entries: Sequence[Entries], vocabulary: int) -> tuple[EntryRows, Statistics]:
    """Encoded as `TopP` does."""
    ids_E = np.array([i for row in entries for i in row], dtype=np.int64)
    log_p_E = np.array([p for row in entries for p in row.values()], dtype=np.float64)
    counts_N = np.array([len(row) for row in entries], dtype=np.uint8)
    mass_N = np.array([sum(map(math.exp, row.values())) for row in entries])
    low_E, high_E = split_ids(ids_E, vocabulary)
    rows = EntryRows(
        counts_N=counts_N,
        valued_N=None,
        low_E=low_E,
        high_E=high_E,
        values_X=log_p_E.astype("<f2"),
        tail_N=(1.0 - mass_N).clip(0.0, 1.0).astype("<f4"),
    )
    return rows, Statistics(mass=float(mass_N.clip(max=1.0).sum()))


def mean_log_probability(answer: Answer) -> float | None:
    """Mean over the answer's tokens with a log-probability; None if there are none."""
    entries = [one for one in answer.logprobs or [] if isinstance(one, dict)]
    values = [float(one["logprob"]) for one in entries if is_logprob(one.get("logprob"))]
    return sum(values) / len(values) if values else None
