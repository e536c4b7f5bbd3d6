"""Checks of teachers with another tokenizer than the student, on a sample of the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from stillhouse.data.shift import IGNORED
from stillhouse.data.tokenize_rows import TokenRow
from stillhouse.errors import DataError
from stillhouse.finding import Finding
from stillhouse.language_model.job import Job
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.roots import Roots

TOPIC = "tokenizer"


def check_alignment(job: Job, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Report how much of the sample each of these teachers can teach."""
    code = job.trust_remote_code
    tokenizer = load_tokenizer(job.tokenizer_path, trust_remote_code=code)
    for source in job.teachers:
        other = load_tokenizer(source.path, trust_remote_code=code)
        if other.get_vocab() == tokenizer.get_vocab():
            continue
        aligner = TokenAligner(tokenizer, other)
        roots = aligner.roots()
        try:
            supervised, covered, different = _counts(aligner, roots, rows)
        except DataError as error:
            yield Finding("error", TOPIC, f"{source.described}: {error.what}", error.fix)
            continue
        share = covered / max(1, supervised)
        text = (
            f"{source.described} has another tokenizer: {roots.shared:,} strings are tokens of "
            f"both, and {share:.1%} of the supervised tokens begin where one of its tokens does "
            f"({different / max(1, covered):.2%} of these belong to another root and are merged)"
        )
        fix = "the other tokens learn nothing from it" if share < 0.5 else None
        yield Finding("ok" if fix is None else "warning", TOPIC, text, fix)


def _counts(aligner: TokenAligner, roots: Roots, rows: Sequence[TokenRow]) -> tuple[int, int, int]:
    """Supervised tokens, those at a shared boundary, and those of them with different roots."""
    supervised = covered = different = 0
    for row in rows:
        ids_L = row.ids.astype(np.int64)
        labels_L = np.where(row.supervised, ids_L, IGNORED)
        labels_L[0] = IGNORED
        (found,) = aligner.align(ids_L[None], np.arange(len(ids_L))[None], labels_L[None])
        taught_L = (labels_L != IGNORED) & (found.begins_L >= 0)
        theirs = found.ids_M[found.begins_L[taught_L]]
        supervised += int((labels_L != IGNORED).sum())
        covered += int(taught_L.sum())
        different += int((roots.student_V[ids_L[taught_L]] != roots.teacher_W[theirs]).sum())
    return supervised, covered, different
