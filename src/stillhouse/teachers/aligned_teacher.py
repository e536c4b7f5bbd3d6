"""A teacher with another tokenizer, seen through the student's tokens.

Shapes: N supervised rows, D hidden width, V student tokens, W teacher tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from stillhouse.data.batches import Batch, Batches
from stillhouse.errors import SignalError
from stillhouse.signals import DenseSignal, Fold, FoldedSignal
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.aligned_text import (
    MERGED_FROM_TOKENS,
    AlignedBatch,
    Alignment,
    observed,
    rewritten,
)
from stillhouse.teachers.roots import Roots, merged
from stillhouse.teachers.roots_file import cached_roots
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView


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
        self.roots = roots or cached_roots(self.aligner)
        self._merged = roots is not None
        self._skips = False
        self._fold: Fold | None = None  # of the roots, on the teacher's device
        self.vocabulary = student.size
        self.described = f"{teacher.described}, in the tokens of {student.name}"
        self.fingerprint = teacher.fingerprint
        self.collective = teacher.collective
        self.tokens_together = teacher.tokens_together

    @property
    def alignment(self) -> Alignment:
        """What comparing a student with this teacher needs."""
        return Alignment(self.aligner, self.roots)

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
            self.roots = merged(self.roots, observed(self.aligner, text, MERGED_FROM_TOKENS))
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
        return rewritten(self.aligner, batch, skip_unreadable=self._skips)

    def for_own_text(self) -> Teacher:
        """Teaches nothing in what a student writes and the teacher's template cannot render."""
        other = copy.copy(self)
        other.teacher, other._skips = self.teacher.for_own_text(), True
        return other

    def place(self, device: torch.device, context: int) -> None:
        self.teacher.place(device, context)

    def flops(self, tokens: int) -> int:
        return self.teacher.flops(tokens)

    @property
    def memory_bytes(self) -> int:
        return self.teacher.memory_bytes
