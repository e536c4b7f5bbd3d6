"""Encoding of a teacher's outputs as the rows of a store."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.signals.encode import Encoder, Statistics, frozen_head_rows, hidden_rows, top_k_rows
from stillhouse.signals.encoded_rows import Rows, concatenate
from stillhouse.signals.encodings import AnswerChunks, FrozenHead, Hidden, TopK
from stillhouse.signals.folded_store import event_logits
from stillhouse.signals.lm_head import head_logits
from stillhouse.signals.manifest import Settings
from stillhouse.signals.segments import Segments
from stillhouse.signals.signal_types import (
    DenseSignal,
    FoldedSignal,
    HiddenSignal,
    LogitsSignal,
    Signal,
    SparseSignal,
)
from stillhouse.signals.writer import uniforms

CHUNK_LOGITS = 1 << 24
"""Number of logits computed at a time on a CPU; 16 times as many on an accelerator."""


def _rows(answer: DenseSignal | LogitsSignal | FoldedSignal) -> Tensor:
    """The answer's tensor with one row for each supervised token."""
    if isinstance(answer, FoldedSignal):
        return answer.covered_N
    return answer.logits_NV if isinstance(answer, LogitsSignal) else answer.hidden_ND


class Recorder:
    """Encodes a teacher's outputs according to a store's settings.

    student_head: the weight [V, D] of the student's head, for the encoding frozen_head only.
    """

    def __init__(self, settings: Settings, student_head: Tensor | None = None) -> None:
        self.settings = settings
        self.student_head = student_head
        encoding = settings.encoding
        self._encoder = (
            None
            if isinstance(encoding, AnswerChunks | FrozenHead | Hidden)
            else Encoder(encoding, settings.vocabulary, settings.temperature)
        )
        if isinstance(encoding, FrozenHead):
            expected = (settings.vocabulary, encoding.width)
            found = None if student_head is None else tuple(student_head.shape)
            if found != expected:
                raise SignalError(
                    f"frozen_head needs the student's head of shape {expected}, not {found}"
                )

    @torch.no_grad()
    def encode(self, segments: Segments, answer: Signal | HiddenSignal) -> tuple[Rows, Statistics]:
        """Encode the rows of these segments. Row n of `answer` belongs to their n-th supervised
        token.

        Raises SignalError if the answer does not match the settings or is not finite.
        """
        encoding = self.settings.encoding
        if isinstance(answer, HiddenSignal):
            if not isinstance(encoding, Hidden) or tuple(answer.hidden_ND) != encoding.layers:
                raise SignalError(
                    f"hidden states of layers {tuple(answer.hidden_ND)} do not match {encoding}"
                )
            return hidden_rows(answer.hidden_ND)
        if isinstance(answer, SparseSignal):
            return self._top_k(answer)
        of_tokens = isinstance(answer, FoldedSignal) and self._encoder is None
        if (
            of_tokens
            or isinstance(encoding, AnswerChunks)
            or not isinstance(answer, DenseSignal | LogitsSignal | FoldedSignal)
        ):
            raise SignalError(f"a {type(answer).__name__} cannot be recorded as {encoding.kind}")
        rows_N = _rows(answer)
        if len(rows_N) != segments.rows or not len(rows_N):
            raise SignalError(
                f"the teacher's answer has {len(rows_N)} rows, but the segments have "
                f"{segments.rows} supervised tokens"
            )
        uniform_NU = uniforms(segments, self.settings)
        step = CHUNK_LOGITS * (1 if rows_N.device.type == "cpu" else 16)
        widest = len(answer.fold.teacher_W) if isinstance(answer, FoldedSignal) else 0
        step = max(1, step // max(self.settings.vocabulary, widest))
        parts, statistics = [], Statistics()
        for start in range(0, len(rows_N), step):
            here = slice(start, start + step)
            if isinstance(answer, FoldedSignal):
                logits_nV = event_logits(answer, here, self.settings.temperature)
            elif isinstance(answer, LogitsSignal):
                logits_nV = rows_N[here]
            else:
                logits_nV = head_logits(answer.head, rows_N[here])
            rows, more = self._chunk(logits_nV, uniform_NU[here])
            parts.append(rows)
            statistics += more
        return concatenate(parts), statistics

    def _top_k(self, answer: SparseSignal) -> tuple[Rows, Statistics]:
        encoding, found = self.settings.encoding, answer.ids_NK.shape[1]
        if encoding != TopK(found) or answer.temperature != self.settings.temperature:
            raise SignalError(
                f"the {found} most likely tokens at temperature {answer.temperature:g} cannot be "
                f"recorded as {encoding} at temperature {self.settings.temperature:g}"
            )
        return top_k_rows(answer, self.settings.vocabulary)

    def _chunk(self, logits_nV: Tensor, uniforms_nU: Tensor) -> tuple[Rows, Statistics]:
        if self._encoder is not None:
            return self._encoder(logits_nV.float(), uniforms_nU)
        if self.student_head is None:
            raise SignalError("the encoding hidden requires a HiddenSignal, not logits")
        head_VD = self.student_head.to(logits_nV.device)
        return frozen_head_rows(logits_nV, head_VD, self.settings.temperature)
