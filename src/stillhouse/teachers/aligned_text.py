"""Text in the tokens of a student and of a teacher with another tokenizer, without the models.

Shapes: R windows, L tokens of the student, M tokens of the teacher, N supervised rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.data.batches import Batch, completed
from stillhouse.data.shift import IGNORED, supervised_targets
from stillhouse.data.windows import WindowSet
from stillhouse.teachers.align_tokens import AlignedWindow, TokenAligner
from stillhouse.teachers.roots import Roots
from stillhouse.teachers.text_tokens import Ids

MERGED_FROM_TOKENS = 200_000
"""Tokens of training text that show which roots are one event."""
TOGETHER = 16
"""Windows that are aligned at a time."""


@dataclass(frozen=True)
class Alignment:
    """A student's tokenizer and that of a teacher: their text side by side, and their roots."""

    aligner: TokenAligner
    roots: Roots


@dataclass(frozen=True)
class AlignedBatch:
    """A student's batch in the teacher's tokens, with labels where both begin a token.

    covered_N: the student's supervised rows that have such a label. windows: one a row.
    """

    batch: Batch
    covered_N: Tensor
    windows: tuple[AlignedWindow, ...]


@dataclass(frozen=True)
class AlignedText:
    """A student's batch in the teacher's tokens, with labels at all tokens of the chunks: of text
    between shared boundaries, which both models are measured on.

    covered_N: the student's supervised rows where both begin a token that is in `batch`.
    rows_C: the teacher's row for each of these. bytes: of the labels.
    """

    batch: Batch
    covered_N: Tensor
    rows_C: Tensor
    bytes: int


def rewritten(
    aligner: TokenAligner, batch: Batch, *, skip_unreadable: bool = False
) -> AlignedBatch:
    """The batch in the teacher's tokens. Raises DataError as `TokenAligner`.

    skip_unreadable: documents that would raise it are covered nowhere.
    """
    ids_RL, positions_RL, labels_RL = _arrays(batch)
    windows = aligner.align(ids_RL, positions_RL, labels_RL, skip_unreadable=skip_unreadable)
    covered_RL = _supervised(labels_RL) & np.stack([w.begins_L >= 0 for w in windows])
    chosen = [w.begins_L[covered_L] for w, covered_L in zip(windows, covered_RL, strict=True)]
    covered_N = torch.from_numpy(covered_RL[_supervised(labels_RL)])
    return AlignedBatch(_batch(windows, chosen), covered_N, tuple(windows))


def whole_text(aligner: TokenAligner, batch: Batch) -> AlignedText:
    """The batch in the teacher's tokens, all of which are measured. Raises DataError as
    `TokenAligner`."""
    ids_RL, positions_RL, labels_RL = _arrays(batch)
    windows = aligner.align(ids_RL, positions_RL, labels_RL)
    measured = []
    covered_RL = np.zeros(labels_RL.shape, dtype=bool)
    for row, window in enumerate(windows):
        labels_L = np.where(_supervised(labels_RL)[row], labels_RL[row], IGNORED)
        chunks = aligner.chunks(window, ids_RL[row], positions_RL[row], labels_L)
        covered_RL[row, chunks.student_C2[:, 0]] = True
        inside = [np.arange(start, stop) for start, stop in chunks.teacher_C2]
        measured.append(np.concatenate([np.empty(0, np.int64), *inside]))
    aligned = _batch(windows, measured)
    labels_RM = aligned["labels"].numpy()
    # The teacher's row of a label is its number among the labels of the batch.
    number_RM = np.cumsum(labels_RM != IGNORED).reshape(labels_RM.shape) - 1
    rows = [number_RM[row, window.begins_L[covered_RL[row]]] for row, window in enumerate(windows)]
    return AlignedText(
        batch=aligned,
        covered_N=torch.from_numpy(covered_RL[_supervised(labels_RL)]),
        rows_C=torch.from_numpy(np.concatenate(rows)),
        bytes=int(aligner.teacher.lengths_V[labels_RM[labels_RM != IGNORED]].sum()),
    )


def observed(aligner: TokenAligner, text: WindowSet, tokens: int) -> Counter[tuple[int, int]]:
    """Tokens (student, teacher) that begin at the same place, with their counts, in about so many
    tokens of text."""
    found: Counter[tuple[int, int]] = Counter()
    for batch in _batches(text, tokens):
        aligned = rewritten(aligner, batch)
        ours = supervised_targets(batch["labels"])[aligned.covered_N]
        theirs = supervised_targets(aligned.batch["labels"])
        found.update(zip(ours.tolist(), theirs.tolist(), strict=True))
    return found


def require_readable(aligner: TokenAligner, text: WindowSet) -> None:
    """Raise DataError if the teacher's template cannot render a chat of the text."""
    for batch in _batches(text):
        aligner.require_readable(*_arrays(batch))


def _batches(text: WindowSet, tokens: int | None = None) -> Iterator[Batch]:
    """The windows in order, up to about so many tokens."""
    read = 0
    for start in range(0, len(text), TOGETHER):
        rows = [text[i] for i in range(start, min(start + TOGETHER, len(text)))]
        yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        read += sum(len(row["labels"]) for row in rows)
        if tokens is not None and read >= tokens:
            return


def _arrays(batch: Batch) -> tuple[Ids, Ids, Ids]:
    ids_RL, positions_RL, labels_RL = (
        batch[name].cpu().numpy() for name in ("input_ids", "position_ids", "labels")
    )
    return ids_RL, positions_RL, labels_RL


def _supervised(labels_RL: Ids) -> NDArray[np.bool_]:
    """The first token of a window is not predicted."""
    supervised_RL = labels_RL != IGNORED
    supervised_RL[:, 0] = False
    return supervised_RL


def _batch(windows: Sequence[AlignedWindow], chosen: Sequence[Ids]) -> Batch:
    """The teacher's windows, padded on the right by segments of one token. chosen: the tokens of
    each that are labels."""
    longest = max(2, *(len(window.ids_M) for window in windows))
    shape = (len(windows), longest)
    ids_RM, positions_RM = torch.zeros(shape, dtype=torch.long), torch.zeros(shape).long()
    labels_RM = torch.full(shape, IGNORED)
    for row, (window, at) in enumerate(zip(windows, chosen, strict=True)):
        size = len(window.ids_M)
        ids_RM[row, :size] = torch.from_numpy(window.ids_M)
        positions_RM[row, :size] = torch.from_numpy(window.positions_M)
        labels_RM[row, at] = torch.from_numpy(window.ids_M[at])
    return completed({"input_ids": ids_RM, "labels": labels_RM, "position_ids": positions_RM})
