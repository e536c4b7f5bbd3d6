"""A teacher whose tokenizer differs from the student's.

Shapes: N supervised rows, T rows of the teacher, Q of these inside chunks, C chunks, D hidden
width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.batches import Batch, Batches, targets_of
from stillhouse.errors import SignalError
from stillhouse.signals import ChunkSignal, DenseSignal, Fold, FoldedSignal, Signal
from stillhouse.signals.lm_head import target_log_probabilities
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.aligned_text import (
    MERGED_FROM_TOKENS,
    AlignedBatch,
    Alignment,
    Chosen,
    ChunkRows,
    observed,
    rewritten,
)
from stillhouse.teachers.backbone import trim_head
from stillhouse.teachers.roots import Roots, merged
from stillhouse.teachers.roots_file import cached_roots
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView


class AlignedTeacher(Teacher):
    """Runs a teacher on the same text in its own tokens, and maps the result to the student's.

    Where both tokenizers begin a token, the teacher's distribution is compared with the student's
    over shared roots (`FoldedSignal`). Other rows get no signal.

    Objectives with terms on chunks also get the likelihoods of chunks of several tokens. A teacher
    that returns only log-probabilities of the text's tokens, such as a server, provides the
    likelihoods of all chunks and nothing else.

    teacher: must have a tokenizer, and return dense signals or log-probabilities. tokenizer: the
    student's. roots: if None, derived from both tokenizers, then merged by training text in
    `prepare`. Raises ModelError as `TokenAligner` does.
    """

    gives_chunks = True

    def __init__(self, teacher: Teacher, tokenizer: Any, roots: Roots | None = None) -> None:
        self.teacher, self.tokenizer, self.config = teacher, tokenizer, teacher.config
        self.aligner = TokenAligner(tokenizer, teacher.tokenizer)
        student = self.aligner.student
        self.roots = roots or cached_roots(self.aligner)
        self._merged = roots is not None
        self._chunks: Chosen = "none"
        self._skips = False
        self._fold: Fold | None = None  # of the roots, on the teacher's device
        self.vocabulary = student.size
        self.described = f"{teacher.described}, in the tokens of {student.name}"
        self.fingerprint = teacher.fingerprint
        self.collective = teacher.collective
        self.tokens_together = teacher.tokens_together

    @property
    def alignment(self) -> Alignment:
        """The aligner and roots that are needed to compare a student with this teacher."""
        return Alignment(self.aligner, self.roots)

    def prepare(self, needs: TeacherNeeds, text: Batches | None = None) -> None:
        """Check the objective's needs, and merge roots that occur at the same places in `text`.

        Raises SignalError: terms on intermediate layers, or divergences from a teacher that returns
        no complete distributions.
        """
        super().prepare(needs, text)
        if needs.activations != OUTPUT_ONLY:
            raise SignalError(
                "terms on hidden states or attention compare positions, but "
                f"{self.teacher.described} has a different tokenizer than the student",
                where="objective",
                fix="use divergences at the output",
            )
        full = self.teacher.full_distributions
        if not full and any(term.needs_teacher for term in needs.terms):
            raise SignalError(
                f"{self.teacher.described} has a different tokenizer than the student and returns "
                "no complete distributions, so divergences cannot be computed",
                where="objective",
                fix="use the terms {kind: chunks} and cross_entropy, or a local teacher",
            )
        if needs.chunks:
            # A fold already compares more than the likelihood of a chunk of one token.
            self._chunks = "several tokens" if full else "all"
        if text is not None and not self._merged:
            self.roots = merged(self.roots, observed(self.aligner, text, MERGED_FROM_TOKENS))
            self._merged, self._fold = True, None

    def for_heldout(self, batches: Sequence[Batch]) -> Teacher | None:
        return self if self.teacher.full_distributions else None

    @torch.no_grad()
    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        aligned = self.rewritten(batch)
        view = self.teacher.answer(aligned.batch)
        if view.log_probs_N is not None:
            return TeacherView((self._likelihoods(view.log_probs_N, aligned),))
        return TeacherView(tuple(self._folded(signal, aligned) for signal in view.signals))

    def _folded(self, signal: Signal | ChunkSignal, aligned: AlignedBatch) -> FoldedSignal:
        if not isinstance(signal, DenseSignal):
            raise SignalError(
                f"{self.teacher.described} returns a {type(signal).__name__}, which cannot be "
                "mapped to another vocabulary",
                fix="use a local teacher",
            )
        device, covered_N = signal.hidden_ND.device, aligned.covered_N
        rows_ND = signal.hidden_ND.new_zeros(len(covered_N), signal.hidden_ND.shape[1])
        place_N = covered_N.nonzero()[:, 0].to(device, non_blocking=True)
        begins_T = aligned.begins_T.to(device, non_blocking=True)
        rows_ND.index_copy_(0, place_N, signal.hidden_ND.index_select(0, begins_T))
        dense = DenseSignal(rows_ND, signal.head)
        covered = covered_N.to(device, non_blocking=True)
        chunks = None
        if aligned.chunks is not None:
            rows_Q = aligned.chunks.rows_Q.to(device, non_blocking=True)
            targets_Q = targets_of(aligned.batch)[aligned.chunks.rows_Q]
            targets_Q = targets_Q.to(device, non_blocking=True)
            head = trim_head(signal.head, self.teacher.vocabulary)
            log_p_Q = target_log_probabilities(head, signal.hidden_ND[rows_Q], targets_Q)
            chunks = _summed(log_p_Q, aligned.chunks)
        if self._fold is None or self._fold.student_V.device != device:
            self._fold = self.roots.fold.to(device)
        return FoldedSignal(dense, self._fold, covered, chunks)

    def _likelihoods(self, log_probs_T: Tensor, aligned: AlignedBatch) -> ChunkSignal:
        if aligned.chunks is None:
            raise SignalError(
                f"{self.teacher.described} returns log-probabilities of the text's tokens, which "
                "cannot be mapped to another vocabulary",
                where="objective",
                fix="use the terms {kind: chunks} and cross_entropy, or a local teacher",
            )
        rows_Q = aligned.chunks.rows_Q.to(log_probs_T.device, non_blocking=True)
        return _summed(log_probs_T[rows_Q], aligned.chunks)

    def rewritten(self, batch: Batch) -> AlignedBatch:
        """The batch in the teacher's tokens."""
        return rewritten(self.aligner, batch, skip_unreadable=self._skips, chunks=self._chunks)

    def for_own_text(self) -> Teacher:
        """A copy that gives no signal for a student's text that its chat template cannot render."""
        other = copy.copy(self)
        other.teacher, other._skips = self.teacher.for_own_text(), True
        return other

    def place(self, device: torch.device, context: int) -> None:
        self.teacher.place(device, context)

    def flops(self, tokens: int) -> int:
        return self.teacher.flops(tokens)


def _summed(log_p_Q: Tensor, chunks: ChunkRows) -> ChunkSignal:
    rows_P, chunk_P, chunk_Q = (
        each.to(log_p_Q.device, non_blocking=True)
        for each in (chunks.rows_P, chunks.chunk_P, chunks.chunk_Q)
    )
    log_probs_C = log_p_Q.new_zeros(chunks.count).index_add_(0, chunk_Q, log_p_Q)
    return ChunkSignal(rows_P, chunk_P, log_probs_C)
