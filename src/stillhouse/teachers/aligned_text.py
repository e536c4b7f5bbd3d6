"""The same text in a student's tokens and in those of a teacher with a different tokenizer.

Nothing here needs the models. Shapes: R windows, L tokens of the student, M tokens of the teacher,
N supervised rows of the student, T of the teacher, P the student's rows inside chunks, Q the
teacher's, C chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.data.batches import Batch, completed, in_order
from stillhouse.data.shift import IGNORED, supervised_targets
from stillhouse.data.windows import WindowSet
from stillhouse.teachers.align_tokens import AlignedWindow, Chunks, TokenAligner, places_in
from stillhouse.teachers.roots import Roots
from stillhouse.teachers.text_tokens import Ids

MERGED_FROM_TOKENS = 200_000
"""Number of training tokens that decide which roots are merged."""
TOGETHER = 16
"""Number of windows that are aligned at a time."""


@dataclass(frozen=True)
class Alignment:
    """A student's and a teacher's tokenizers: their aligner and their shared roots."""

    aligner: TokenAligner
    roots: Roots


Chosen = Literal["none", "several tokens", "all"]
"""Which chunks' likelihoods are needed; "several tokens" means of the student or the teacher."""


@dataclass(frozen=True)
class ChunkRows:
    """The rows that predict a batch's chunks, and the chunk of each row.

    rows_P, chunk_P: among the student's supervised rows. rows_Q, chunk_Q: among the teacher's.
    """

    rows_P: Tensor
    chunk_P: Tensor
    rows_Q: Tensor
    chunk_Q: Tensor
    count: int


@dataclass(frozen=True)
class AlignedBatch:
    """A student's batch in the teacher's tokens, with labels where a prediction is needed.

    covered_N: mask of the student's supervised rows whose token begins where one of the teacher's
    does. begins_T: the teacher's rows for these, in order. windows: one per row of the batch.
    chunks: None if none are needed.
    """

    batch: Batch
    covered_N: Tensor
    begins_T: Tensor
    windows: tuple[AlignedWindow, ...]
    chunks: ChunkRows | None = None


def rewritten(
    aligner: TokenAligner, batch: Batch, *, skip_unreadable: bool = False, chunks: Chosen = "none"
) -> AlignedBatch:
    """The batch in the teacher's tokens. Raises DataError as `TokenAligner` does.

    skip_unreadable: cover no row of documents that would raise it.
    """
    ids_RL, positions_RL, labels_RL = _arrays(batch)
    windows = aligner.align(ids_RL, positions_RL, labels_RL, skip_unreadable=skip_unreadable)
    supervised_RL = _supervised(labels_RL)
    covered_RL = supervised_RL & np.stack([w.begins_L >= 0 for w in windows])
    chosen = [w.begins_L[covered_L] for w, covered_L in zip(windows, covered_RL, strict=True)]
    found: list[Chunks] = []
    if chunks != "none":
        for row in zip(windows, ids_RL, positions_RL, supervised_RL, strict=True):
            every = aligner.chunks(*row)
            found.append(every if chunks == "all" else every.of_several_tokens())
        inside = [places_in(each.teacher_C2)[0] for each in found]
        needed = [np.concatenate(both) for both in zip(chosen, inside, strict=True)]
    return _aligned(windows, supervised_RL, covered_RL, needed if found else chosen, found)


def whole_text(aligner: TokenAligner, batch: Batch) -> AlignedBatch:
    """The batch in the teacher's tokens, with labels at all tokens of the chunks.

    Chunks are the text between shared boundaries, on which both models can be evaluated. The
    student's rows that begin a chunk are covered. Raises DataError as `TokenAligner` does.
    """
    ids_RL, positions_RL, labels_RL = _arrays(batch)
    windows = aligner.align(ids_RL, positions_RL, labels_RL)
    supervised_RL = _supervised(labels_RL)
    covered_RL = np.zeros(labels_RL.shape, dtype=bool)
    measured = []
    for row, each in enumerate(zip(windows, ids_RL, positions_RL, supervised_RL, strict=True)):
        chunks = aligner.chunks(*each)
        covered_RL[row, chunks.student_C2[:, 0]] = True
        measured.append(places_in(chunks.teacher_C2)[0])
    return _aligned(windows, supervised_RL, covered_RL, measured)


def _aligned(
    windows: Sequence[AlignedWindow],
    supervised_RL: NDArray[np.bool_],
    covered_RL: NDArray[np.bool_],
    labels: Sequence[Ids],
    chunks: Sequence[Chunks] = (),
) -> AlignedBatch:
    """labels: indices of the tokens that get a label, for each window."""
    batch = _batch(windows, labels)
    row_RL, row_RM = _numbers(supervised_RL), _numbers(batch["labels"].numpy() != IGNORED)
    rows = zip(windows, covered_RL, row_RM, strict=True)
    begins = [row_M[window.begins_L[covered_L]] for window, covered_L, row_M in rows]
    return AlignedBatch(
        batch,
        torch.from_numpy(covered_RL[supervised_RL]),
        torch.from_numpy(np.concatenate(begins)),
        tuple(windows),
        _chunk_rows(chunks, row_RL, row_RM) if chunks else None,
    )


def _numbers(chosen_RX: NDArray[np.bool_]) -> Ids:
    """The index of each chosen token among all chosen tokens of the batch."""
    return np.cumsum(chosen_RX).reshape(chosen_RX.shape) - 1


def _chunk_rows(chunks: Sequence[Chunks], row_RL: Ids, row_RM: Ids) -> ChunkRows:
    """row_RL, row_RM: the row of each supervised token, for the student and the teacher."""
    before = np.cumsum([0, *(len(each.student_C2) for each in chunks)])

    def rows(sides: Sequence[Ids], row_RX: Ids) -> tuple[Tensor, Tensor]:
        found = [places_in(chunks_C2) for chunks_C2 in sides]
        rows = [row_X[places] for (places, _), row_X in zip(found, row_RX, strict=True)]
        owners = [owner + done for (_, owner), done in zip(found, before[:-1], strict=True)]
        return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(owners))

    ours = rows([each.student_C2 for each in chunks], row_RL)
    theirs = rows([each.teacher_C2 for each in chunks], row_RM)
    return ChunkRows(*ours, *theirs, count=int(before[-1]))


def observed(aligner: TokenAligner, text: WindowSet, tokens: int) -> Counter[tuple[int, int]]:
    """Counts of pairs (student, teacher) of tokens that begin at the same place, in about `tokens`
    tokens of text."""
    found: Counter[tuple[int, int]] = Counter()
    together = TOGETHER * len(text[0]["labels"])
    for batch in islice(in_order(text, together), -(-tokens // together)):
        aligned = rewritten(aligner, batch)
        ours = supervised_targets(batch["labels"])[aligned.covered_N]
        theirs = supervised_targets(aligned.batch["labels"])
        found.update(zip(ours.tolist(), theirs.tolist(), strict=True))
    return found


def require_readable(aligner: TokenAligner, text: WindowSet) -> None:
    """Raise DataError if the teacher's template cannot render one of the text's chats."""
    for batch in in_order(text, TOGETHER * len(text[0]["labels"])):
        aligner.require_readable(*_arrays(batch))


def _arrays(batch: Batch) -> tuple[Ids, Ids, Ids]:
    ids_RL, positions_RL, labels_RL = (
        batch[name].cpu().numpy() for name in ("input_ids", "position_ids", "labels")
    )
    return ids_RL, positions_RL, labels_RL


def _supervised(labels_RL: Ids) -> NDArray[np.bool_]:
    supervised_RL = labels_RL != IGNORED
    supervised_RL[:, 0] = False  # nothing predicts a window's first token
    return supervised_RL


def _batch(windows: Sequence[AlignedWindow], chosen: Sequence[Ids]) -> Batch:
    """The teacher's windows, padded on the right with segments of one token.

    chosen: indices of the tokens that are labels, for each window.
    """
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
