"""Turns the log-probabilities of an API's answers into likelihoods of chunks, for an API whose
tokenizer differs from the student's.

A chunk is the text between two neighboring places where both a token of the API and a token of the
student begin. Its log-likelihood is the sum over the API's tokens. Tokens without a known
log-probability belong to no chunk, and neither does the end of a turn.

Shapes: N supervised tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from stillhouse.data.tokenize_rows import TokenRow
from stillhouse.generation.answer_logprobs import (
    ByteVocabulary,
    given_bytes,
    last_turn,
    sound_position,
)
from stillhouse.generation.request import is_logprob
from stillhouse.signals.encode import Statistics
from stillhouse.signals.encoded_rows import EntryRows, split_ids

UNKNOWN = -9999.0
"""The value that OpenAI's API returns for a token that is not among the most probable ones."""


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
    found = position.get("logprob")
    return -math.inf if found is None or not is_logprob(found) else float(found)


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
    begins, values = [], []
    for n, (log_p, reported) in enumerate(zip(answer.log_probs, answer.reported, strict=True)):
        after_chunk = n == 0 or answer.reported[n - 1]
        begins.append(log_p is not None or (not reported and after_chunk))
        values.append(log_p)
    known_N = np.array([one is not None for one in values], dtype=np.uint8)
    begins_N = np.array(begins, dtype=np.uint8)
    low_E, high_E = split_ids(np.array(answer.ids, dtype=np.int64)[begins_N > 0], vocabulary)
    found = [one for one in values if one is not None]
    rows = EntryRows(
        counts_N=begins_N,
        valued_N=known_N,
        low_E=low_E,
        high_E=high_E,
        values_X=np.array(found, dtype=np.float64).astype("<f2"),
        tail_N=None,
    )
    return rows, Statistics(mass=sum(map(math.exp, found)))
