"""A teacher with another tokenizer, seen through the student's tokens.

Shapes: R windows, L tokens of the student, M tokens of the teacher, N supervised rows, D hidden
width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.batches import Batch, Batches, completed
from stillhouse.data.shift import IGNORED, supervised_targets
from stillhouse.errors import SignalError
from stillhouse.signals import DenseSignal, Fold, FoldedSignal
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.align_tokens import AlignedWindow, TokenAligner
from stillhouse.teachers.roots import Roots, merged
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView

MERGED_FROM_TOKENS = 200_000
"""Tokens of training text that show which roots are one event."""


@dataclass(frozen=True)
class AlignedBatch:
    """A student's batch in the teacher's tokens, with labels where both begin a token.

    covered_N: the student's supervised rows that have such a label.
    """

    batch: Batch
    covered_N: Tensor


class AlignedTeacher(Teacher):
    """Answers for the student's tokens by its own tokens of the same text.

    Where both tokenizers begin a token, the teacher's distribution is compared with the student's
    over shared roots (`FoldedSignal`); other rows get nothing from the teacher.

    teacher: has a tokenizer and returns dense signals. tokenizer: the student's. roots: None: made
    from both tokenizers and, in `prepare`, merged by training text.
    Raises ModelError as `TokenAligner`.
    """

    def __init__(self, teacher: Teacher, tokenizer: Any, roots: Roots | None = None) -> None:
        self.teacher, self._tokenizer = teacher, tokenizer
        self.aligner = TokenAligner(tokenizer, teacher.tokenizer)
        student = self.aligner.student
        self.roots = roots or self.aligner.roots()
        self._merged = roots is not None
        self._fold: Fold | None = None  # of the roots, on the teacher's device
        self.vocabulary = student.size
        self.described = f"{teacher.described}, in the tokens of {student.name}"
        self.fingerprint = teacher.fingerprint
        self.collective = teacher.collective
        self.tokens_together = teacher.tokens_together

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def config(self) -> Any:
        return self.teacher.config

    def prepare(self, needs: TeacherNeeds, text: Batches | None = None) -> None:
        """Raises SignalError: terms on intermediate layers, whose rows are other tokens."""
        super().prepare(needs, text)
        if needs.activations != OUTPUT_ONLY:
            raise SignalError(
                "terms on hidden states or attention compare positions, and the teacher "
                f"{self.teacher.described} has other tokens than the student",
                where="objective",
                fix="use divergences at the output",
            )
        if text is not None and not self._merged:
            self.roots = merged(self.roots, self.observed(text, MERGED_FROM_TOKENS))
            self._merged, self._fold = True, None

    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        aligned = self.rewritten(batch)
        view = self.teacher.answer(aligned.batch)
        covered_N = aligned.covered_N
        signals = []
        for signal in view.signals:
            if not isinstance(signal, DenseSignal):
                raise SignalError(
                    f"{self.teacher.described} returns a {type(signal).__name__}, which cannot be "
                    "folded to another vocabulary",
                    fix="use a local teacher",
                )
            device = signal.hidden_ND.device
            rows_ND = signal.hidden_ND.new_zeros(len(covered_N), signal.hidden_ND.shape[1])
            place_N = covered_N.nonzero()[:, 0].to(device, non_blocking=True)
            rows_ND.index_copy_(0, place_N, signal.hidden_ND)
            dense = DenseSignal(rows_ND, signal.head)
            covered = covered_N.to(device, non_blocking=True)
            signals.append(FoldedSignal(dense, self._fold_on(device), covered))
        return TeacherView(tuple(signals))

    def _fold_on(self, device: torch.device) -> Fold:
        if self._fold is None or self._fold.student_V.device != device:
            self._fold = self.roots.fold.to(device)
        return self._fold

    def rewritten(self, batch: Batch) -> AlignedBatch:
        """The batch in the teacher's tokens."""
        ids_RL, positions_RL, labels_RL = (
            batch[name].cpu().numpy() for name in ("input_ids", "position_ids", "labels")
        )
        windows = self.aligner.align(ids_RL, positions_RL, labels_RL)
        supervised_RL = labels_RL != IGNORED
        supervised_RL[:, 0] = False
        covered_RL = supervised_RL & np.stack([w.begins_L >= 0 for w in windows])
        covered_N = torch.from_numpy(covered_RL[supervised_RL])
        return AlignedBatch(_batch(windows, covered_RL), covered_N)

    def observed(self, text: Batches, tokens: int) -> Counter[tuple[int, int]]:
        """Tokens (student, teacher) that begin at the same place, with their counts, in about so
        many tokens of text."""
        found: Counter[tuple[int, int]] = Counter()
        together = max(1, 2**14 // text.context)
        for start in range(0, min(len(text), -(-tokens // text.context)), together):
            rows = [text[i] for i in range(start, min(start + together, len(text)))]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            aligned = self.rewritten(batch)
            ours = supervised_targets(batch["labels"])[aligned.covered_N]
            theirs = supervised_targets(aligned.batch["labels"])
            found.update(zip(ours.tolist(), theirs.tolist(), strict=True))
        return found

    def place(self, device: torch.device, context: int) -> None:
        self.teacher.place(device, context)

    def flops(self, tokens: int) -> int:
        return self.teacher.flops(tokens)

    @property
    def memory_bytes(self) -> int:
        return self.teacher.memory_bytes


def _batch(windows: Sequence[AlignedWindow], covered_RL: np.ndarray) -> Batch:
    """The teacher's windows, padded on the right by segments of one token."""
    longest = max(2, *(len(window.ids_M) for window in windows))
    shape = (len(windows), longest)
    ids_RM, positions_RM = torch.zeros(shape, dtype=torch.long), torch.zeros(shape).long()
    labels_RM = torch.full(shape, IGNORED)
    for row, (window, covered_L) in enumerate(zip(windows, covered_RL, strict=True)):
        size = len(window.ids_M)
        ids_RM[row, :size] = torch.from_numpy(window.ids_M)
        positions_RM[row, :size] = torch.from_numpy(window.positions_M)
        at = window.begins_L[covered_L]
        labels_RM[row, at] = torch.from_numpy(window.ids_M[at])
    return completed({"input_ids": ids_RM, "labels": labels_RM, "position_ids": positions_RM})
