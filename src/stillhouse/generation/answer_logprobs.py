"""Turns the log-probabilities of an API's answers into a signal for the student's tokens.

An answer's tokens match the student's if both have the same bytes and the same boundaries. Each
token then gets the distribution that the API returned: the k most probable tokens, and a tail with
the mass of all others. For tokens without one (mostly the end of the turn, which few servers
report, and turns in the prompt), all mass is on the actual token. If the teacher sampled that token
at temperature 1, this is an unbiased estimate.

For an API whose tokenizer differs from the student's, the signal is the likelihoods of chunks. A
chunk is the text between two neighboring places where both a token of the API and a token of the
student begin. Its log-likelihood is the sum over the API's tokens. Tokens without a known
log-probability belong to no chunk, and neither does the end of a turn.

Shapes: N supervised tokens of a row, E entries of all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np

from stillhouse.data.tokenize_rows import TokenRow
from stillhouse.errors import SignalError
from stillhouse.generation.request import Answer, are_logprobs, is_logprob
from stillhouse.signals.encode import Statistics
from stillhouse.signals.encoded_rows import EntryRows, split_ids
from stillhouse.teachers.text_tokens import token_bytes

LEAST = float(np.finfo(np.float16).min)
UNKNOWN = -9999.0
"""The value that OpenAI's API returns for a token that is not among the most probable ones."""
OVER_ONE = 1e-3
"""How much a token's probabilities may exceed 1 in total because of rounding."""

Entries = dict[int, float]
"""Log-probabilities at one position, by token id."""


@dataclass(frozen=True)
class ByteVocabulary:
    """A tokenizer's tokens as bytes.

    id_of: ids by complete bytes. shown_id_of: ids by the text that remains if a server drops bytes
    that are not a complete character. Tokens that share a key are ambiguous, so they are left out
    of these mappings and stay in the tail.
    """

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
    pairs = list(pairs)
    counts = Counter(key for key, _ in pairs)
    return {key: i for key, i in pairs if counts[key] == 1}


def _shown(token: bytes) -> str:
    return token.decode("utf-8", "ignore")


@dataclass(frozen=True)
class Aligned:
    """The signal of one row.

    entries: the distribution at each supervised token, most probable first. reported: whether it
    was returned by the API. matched: whether the answer's tokens match the student's.
    """

    entries: list[Entries]
    reported: list[bool]
    matched: bool

    def first(self, kept: int) -> Aligned:
        """Keep only the first tokens."""
        return Aligned(self.entries[:kept], self.reported[:kept], self.matched)


def align(
    row: TokenRow, text: str, logprobs: Sequence[Any] | None, k: int, vocabulary: ByteVocabulary
) -> Aligned:
    """Find the signal of a row whose last turn is `text`.

    logprobs: as returned by the API for the complete answer, which ends with `text`. Malformed
    ones, which an older journal may contain, count as not reported. Raises SignalError if
    probabilities sum to more than 1.
    """
    supervised = np.flatnonzero(row.supervised)
    supervised = supervised[supervised > 0]
    ids = row.ids[supervised].tolist()
    entries: list[Entries] = [{i: 0.0} for i in ids]
    positions = [sound_position(one) for one in logprobs or []]
    found = _places(row, supervised, text, positions, vocabulary)
    reported = [False] * len(ids)
    for place, position in found:
        distribution = _entries(position, ids[place], k, vocabulary)
        if distribution:
            entries[place] = distribution
            reported[place] = True
    return Aligned(entries, reported, bool(found))


def sound_position(position: Any) -> Mapping[str, Any]:
    """Return the position; if it is malformed, only its token's text."""
    if are_logprobs([position]):
        return position
    return {"token": position.get("token") if isinstance(position, dict) else None}


def _places(
    row: TokenRow, supervised: Any, text: str, logprobs: Sequence[Any], vocabulary: ByteVocabulary
) -> list[tuple[int, Any]]:
    """Pair supervised tokens, by index, with the API's positions; empty if they do not match."""
    turn = last_turn(supervised)
    ours = [vocabulary.bytes_of.get(i, b"") for i in row.ids[supervised[turn:]].tolist()]
    at, end = _span(ours, text.encode())
    for first in range(len(logprobs) - (end - at), -1, -1) if at < end else ():
        last = first + end - at
        if all(map(_is_token, logprobs[first:last], ours[at:end])):
            places = [(turn + at + n, logprobs[first + n]) for n in range(end - at)]
            if end < len(ours) and last < len(logprobs) and _is_token(logprobs[last], ours[end]):
                places.append((turn + end, logprobs[last]))  # also the end of the turn
            return places
    return []


def last_turn(supervised: Any) -> int:
    """Index of the first token in the last run of consecutive supervised tokens.

    supervised: positions of the supervised tokens in the row.
    """
    turn = len(supervised) - 1
    while turn > 0 and supervised[turn - 1] == supervised[turn] - 1:
        turn -= 1
    return max(turn, 0)


def _span(tokens: Sequence[bytes], text: bytes) -> tuple[int, int]:
    """The range of tokens that spell exactly this text; (0, 0) if there is none."""
    start = b"".join(tokens).find(text)
    offsets = [0, *accumulate(map(len, tokens))]
    if not text or start not in offsets or start + len(text) not in offsets:
        return 0, 0
    return offsets.index(start), offsets.index(start + len(text))


def _is_token(position: Any, token: bytes) -> bool:
    """Whether a position is for a token with these bytes.

    A server that returns only text cannot represent bytes that are not a complete character, so
    only the rest of the token is compared then.
    """
    known = given_bytes(position)
    if known is not None:
        return known == token
    return position.get("token") in (_shown(token), token.decode("utf-8", "replace"))


def given_bytes(position: Any) -> bytes | None:
    """The bytes that the server returned for the token of a position or an alternative, if any."""
    given = position.get("bytes")
    return bytes(given) if isinstance(given, list) and given else None


def _entries(position: Any, own: int, k: int, vocabulary: ByteVocabulary) -> Entries:
    """The k most probable tokens at a position, without those that the tokenizer lacks.

    own: the token that was generated there. Raises SignalError.
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
            f"the API's probabilities at the token {position.get('token')!r} sum to {mass:.4f}, "
            "which is more than 1",
            where="signals.answers",
            fix="configure the server to return log-probabilities from before sampling, or remove "
            "signals.answers",
        )
    return found


def _token_id(alternative: Any, vocabulary: ByteVocabulary) -> int | None:
    known = given_bytes(alternative)
    if known is not None:
        return vocabulary.id_of.get(known)
    return vocabulary.shown_id_of.get(alternative["token"])


def entry_rows(entries: Sequence[Entries], vocabulary: int) -> tuple[EntryRows, Statistics]:
    """Encode entries as `TopP` does."""
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
    """Mean log-probability of the answer's tokens; None if no token has one."""
    entries = [one for one in answer.logprobs or [] if isinstance(one, dict)]
    values = [float(one["logprob"]) for one in entries if is_logprob(one.get("logprob"))]
    return sum(values) / len(values) if values else None


# --- chunks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkedAnswer:
    """The chunks of one row.

    ids: the row's supervised tokens. log_probs: log-likelihood of the chunk that begins at each
    token; None where no chunk begins. reported: whether each token is in a chunk. matched: whether
    any token is.
    """

    ids: list[int]
    log_probs: list[float | None]
    reported: list[bool]
    matched: bool

    def first(self, kept: int) -> ChunkedAnswer:
        """Keep only the first tokens, and drop a chunk that continues after them."""
        log_probs, reported = self.log_probs[:kept], self.reported[:kept]
        if kept < len(self.ids) and self.reported[kept] and self.log_probs[kept] is None:
            start = max(n for n in range(kept) if log_probs[n] is not None)
            log_probs[start] = None
            reported[start:] = [False] * (kept - start)
        return ChunkedAnswer(self.ids[:kept], log_probs, reported, self.matched)


def align_chunks(
    row: TokenRow, text: str, logprobs: Sequence[Any] | None, vocabulary: ByteVocabulary
) -> ChunkedAnswer:
    """Find the chunks of a row whose last turn is `text`.

    logprobs: as returned by the API for the complete answer, which ends with `text`.
    """
    supervised = np.flatnonzero(row.supervised)
    supervised = supervised[supervised > 0]
    ids = row.ids[supervised].tolist()
    log_probs: list[float | None] = [None] * len(ids)
    reported = [False] * len(ids)
    turn = last_turn(supervised)
    positions = [sound_position(one) for one in logprobs or []]
    ours = _boundaries([vocabulary.bytes_of.get(i, b"") for i in ids[turn:]], text, last=False)
    theirs = _boundaries([_shown_bytes(one) for one in positions], text, last=True)
    for start, end in pairwise(sorted(ours.keys() & theirs.keys())):
        told = [_log_p(one) for one in positions[theirs[start][1] : theirs[end][0]]]
        if min(told) > UNKNOWN:
            first, after = turn + ours[start][1], turn + ours[end][0]
            log_probs[first] = min(sum(told), 0.0)
            reported[first:after] = [True] * (after - first)
    return ChunkedAnswer(ids, log_probs, reported, any(reported))


def _log_p(position: Mapping[str, Any]) -> float:
    """The log-probability of a position; -inf if it is unknown."""
    found: Any = position.get("logprob")
    return float(found) if is_logprob(found) else -math.inf


def _shown_bytes(position: Mapping[str, Any]) -> bytes:
    known = given_bytes(position)
    return str(position.get("token") or "").encode() if known is None else known


def _boundaries(tokens: Sequence[bytes], text: str, *, last: bool) -> dict[int, tuple[int, int]]:
    """Map each byte offset of the text at which a token begins or ends to the first and the last
    token that begin there (they differ if a token has no bytes).

    Empty if the tokens do not contain the text. last: use the last occurrence of the text instead
    of the first.
    """
    content, whole = text.encode(), b"".join(tokens)
    begin = whole.rfind(content) if last else whole.find(content)
    found: dict[int, tuple[int, int]] = {}
    if not content or begin < 0:
        return found
    for number, at in enumerate(accumulate(map(len, tokens), initial=0)):
        if begin <= at <= begin + len(content):
            found[at - begin] = (found.get(at - begin, (number,))[0], number)
    return found


def chunk_rows(answer: ChunkedAnswer, vocabulary: int) -> tuple[EntryRows, Statistics]:
    """Encode an answer as described in `AnswerChunks`. vocabulary: the student's size."""
    known_N = np.array([one is not None for one in answer.log_probs], dtype=bool)
    reported_N = np.array(answer.reported, dtype=bool)
    after_chunk_N = np.append(True, reported_N)[:-1]
    begins_N = known_N | (~reported_N & after_chunk_N)
    low_E, high_E = split_ids(np.array(answer.ids, dtype=np.int64)[begins_N], vocabulary)
    found = [one for one in answer.log_probs if one is not None]
    rows = EntryRows(
        counts_N=begins_N.astype(np.uint8),
        valued_N=known_N.astype(np.uint8),
        low_E=low_E,
        high_E=high_E,
        values_X=np.array(found, dtype=np.float64).astype("<f2"),
        tail_N=None,
    )
    return rows, Statistics(mass=sum(map(math.exp, found)))
