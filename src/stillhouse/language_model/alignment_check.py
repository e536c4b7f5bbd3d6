"""Checks teachers whose tokenizer differs from the student's on a sample of the text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from stillhouse.data.shift import IGNORED
from stillhouse.data.tokenize_rows import TokenRow
from stillhouse.errors import DataError
from stillhouse.finding import Finding
from stillhouse.language_model.job import Job
from stillhouse.language_model.roots_stage import aligner_of
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.roots import Roots, merged
from stillhouse.teachers.roots_file import cached_roots, token_text

TOPIC = "tokenizer"
FEW = 0.5
"""The fraction of supervised tokens at a shared boundary below which a warning is given."""
EXAMPLES = 3


@dataclass
class _Counts:
    """Counts over the sample.

    supervised: the number of supervised tokens. pairs: (student, teacher) tokens that start at the
    same place. alone: the places of rows without any pairs. changed: the places of rows whose text
    the teacher's tokenizer changes.
    """

    supervised: int = 0
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)
    alone: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def check_alignment(job: Job, rows: Sequence[tuple[str, TokenRow]]) -> Iterator[Finding]:
    """Report how much of the sample each teacher with a different tokenizer can teach. rows: pairs
    of a row's place and its tokens."""
    for source in job.other_teachers:
        aligner = aligner_of(job.tokenizer, source)
        try:
            counts = _counts(aligner, rows)
        except DataError as error:
            yield Finding("error", TOPIC, f"{source.described}: {error.what}", error.fix)
            continue
        yield from _findings(source, aligner, counts, len(rows))


def _counts(aligner: TokenAligner, rows: Iterable[tuple[str, TokenRow]]) -> _Counts:
    """Count pairs of tokens. Raises DataError, with the row's place, if the teacher cannot read a
    row."""
    found = _Counts()
    for where, row in rows:
        ids_L = row.ids.astype(np.int64)
        labels_L = np.where(row.supervised, ids_L, IGNORED)
        labels_L[0] = IGNORED
        try:
            (window,) = aligner.align(ids_L[None], np.arange(len(ids_L))[None], labels_L[None])
        except DataError as error:
            raise DataError(f"{where}: {error.what}", fix=error.fix) from error
        taught_L = (labels_L != IGNORED) & (window.begins_L >= 0)
        theirs = window.ids_M[window.begins_L[taught_L]]
        found.supervised += int((labels_L != IGNORED).sum())
        found.pairs.update(zip(ids_L[taught_L].tolist(), theirs.tolist(), strict=True))
        if window.changed:
            found.changed.append(where)
        elif not taught_L.any():
            found.alone.append(where)
    return found


def _findings(
    source: ModelSource, aligner: TokenAligner, counts: _Counts, rows: int
) -> Iterator[Finding]:
    covered = counts.pairs.total()
    if not covered:
        text = f"{source.described}: no supervised token starts where one of its tokens does"
        yield Finding("error", TOPIC, text, "choose a teacher that can read this text")
        return
    before = cached_roots(aligner)
    roots = merged(before, counts.pairs)
    other = {
        pair: count
        for pair, count in counts.pairs.items()
        if before.student_V[pair[0]] != before.teacher_W[pair[1]]
    }
    share = covered / max(1, counts.supervised)
    tokens, events = _entropies(roots, counts.pairs)
    text = (
        f"{source.described} has a different tokenizer: {roots.shared:,} strings are tokens of "
        f"both, and {share:.1%} of the supervised tokens start where one of its tokens does; these "
        f"keep {events:.3f} of their {tokens:.3f} nats of entropy. "
        f"{sum(other.values()) / covered:.2%} of them have a different root than the teacher's "
        "token there; such roots are merged"
    )
    if other:
        some = sorted(other, key=lambda pair: (-other[pair], pair))[:EXAMPLES]
        text += f": {', '.join(_shown(pair, aligner) for pair in some)} (student, teacher)"
    fix = "the other tokens learn nothing from this teacher" if share < FEW else None
    yield Finding("ok" if fix is None else "warning", TOPIC, text, fix)
    if counts.changed:
        text = (
            f"the tokenizer of {source.described} changes {len(counts.changed):,} of {rows:,} "
            f"rows, such as {counts.changed[0]}: it teaches nothing there"
        )
        fix = "normalize the text first (NFC), remove these rows, or also train on cross-entropy"
        yield Finding("warning", TOPIC, text, fix)
    if counts.alone:
        text = (
            f"{len(counts.alone):,} of {rows:,} rows, such as {counts.alone[0]}, have no token "
            f"that starts where one of {source.described} does: it teaches nothing there"
        )
        yield Finding("warning", TOPIC, text, "remove these rows, or also train on cross-entropy")


def _entropies(roots: Roots, pairs: Counter[tuple[int, int]]) -> tuple[float, float]:
    """Return the entropy, in nats, of the taught student tokens, and of their roots."""
    tokens, events = Counter[int](), Counter[int]()
    for (ours, _), count in pairs.items():
        tokens[ours] += count
        events[int(roots.student_V[ours])] += count
    return _entropy(tokens), _entropy(events)


def _entropy(counts: Counter[int]) -> float:
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


def _shown(pair: tuple[int, int], aligner: TokenAligner) -> str:
    ours, theirs = pair
    return f"{token_text(ours, aligner.student)!r} and {token_text(theirs, aligner.teacher)!r}"
