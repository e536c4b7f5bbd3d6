"""The fused loss's loop over chunks of rows, and the sums that it accumulates.

A *chunk* is large enough for fast matrix products. The teacher's logits, which no product reads,
exist for one *part* of a chunk at a time. A *block* is small enough that its float32 scratch stays
in the processor's cache during about ten elementwise passes.

Shapes: N rows, n rows of a chunk, m rows of a part, b rows of a block, M terms, D hidden width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillhouse.objectives.block_losses import Blocks
from stillhouse.objectives.dense import IMPOSSIBLE, ProjectedRows, Teacher
from stillhouse.objectives.folded import Folding
from stillhouse.objectives.groups import Workspace, group_by_temperature
from stillhouse.objectives.products import (
    ComputeHead,
    accumulate_columns_,
    accumulate_outer_,
    product_,
)
from stillhouse.objectives.terms import Term
from stillhouse.objectives.triton_dispatch import RowKernels, row_kernels, runs_kernels
from stillhouse.signals import (
    DenseSignal,
    FoldedSignal,
    FrozenHeadSignal,
    LMHead,
    LogitsSignal,
    SampledSignal,
    Signal,
    SparseSignal,
)

CHUNK_ROWS_CPU = 64, 256
"""Minimum and maximum. More rows make products faster, up to a point."""
NARROW_CHUNK_ROWS_CPU = 64, 512
"""In 16 bits, products are about three times as fast, so everything else matters more."""
CHUNK_ROWS_CUDA = 2048
NARROW_PARTS_CPU = 2
"""Parts per chunk in 16 bits, where logits take most of the memory."""
BLOCK_ELEMENTS_CPU = 1 << 19
NARROW_BLOCK_ELEMENTS_CPU = 1 << 18
LEAST_BLOCK_ROWS = 4
"""With fewer rows per block, operators cannot keep several threads busy."""
BLOCK_ELEMENTS_CUDA = 1 << 26
NARROW_SUM_CHUNKS = 16
"""Products of at most this many chunks are added in 16 bits: a sum's rounding error grows with the
number of summands."""


def rows_per_chunk(width: int, dtype: torch.dtype, device: str) -> int:
    """Rows per chunk on a device type. width: hidden width; dtype: compute dtype of products."""
    if device != "cpu":
        return CHUNK_ROWS_CUDA
    least, most = NARROW_CHUNK_ROWS_CPU if dtype.itemsize < 4 else CHUNK_ROWS_CPU
    return min(most, max(least, 2 * width // dtype.itemsize))


def rows_per_part(chunk: int, dtype: torch.dtype, device: str) -> int:
    """Rows per part: those whose teacher logits exist at the same time."""
    return -(-chunk // NARROW_PARTS_CPU) if device == "cpu" and dtype.itemsize < 4 else chunk


def rows_per_block(part: int, vocabulary: int, dtype: torch.dtype, device: str) -> int:
    """Rows per block: those whose float32 scratch exists at the same time."""
    if device != "cpu":
        return min(part, max(1, BLOCK_ELEMENTS_CUDA // vocabulary))
    rows = max(1, BLOCK_ELEMENTS_CPU // vocabulary)
    if dtype.itemsize < 4:
        rows = min(rows, max(LEAST_BLOCK_ROWS, NARROW_BLOCK_ELEMENTS_CPU // vocabulary))
    return min(part, rows)


@dataclass(frozen=True)
class Plan:
    """All arguments of a call that are not tensors."""

    terms: tuple[Term, ...]
    vocab_size: int
    dtype: torch.dtype
    chunk_rows: int | None
    factor: float
    grad: bool

    @property
    def reduce_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def chunk(self, hidden_ND: Tensor) -> int:
        """Rows per chunk. On a CPU, within bounds, a chunk's logits take half the memory of the
        head's float32 gradient."""
        rows, width = hidden_ND.shape
        wanted = self.chunk_rows or rows_per_chunk(width, self.dtype, hidden_ND.device.type)
        return max(1, min(wanted, rows))

    def head_sum_dtype(self, hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
        """Dtype of the head's gradient while the chunks' products are added to it.

        On a CPU, a 16-bit gradient of a few chunks is accumulated in 16 bits, since each product is
        added to the sum before it is rounded. Otherwise, the dtype of reductions.
        """
        device = hidden_ND.device.type
        narrow = weight_VD.dtype == self.dtype and self.dtype.itemsize < 4
        chunks = -(-len(hidden_ND) // self.chunk(hidden_ND))
        if narrow and device == "cpu" and chunks <= NARROW_SUM_CHUNKS:
            return self.dtype
        return self.reduce_dtype


class Work:
    """One call's state: inputs in the compute dtype, results, and the loop over chunks."""

    def __init__(
        self,
        hidden_ND: Tensor,
        head: LMHead,
        signal: Signal | None,
        targets_N: Tensor | None,
        row_weights_N: Tensor | None,
        plan: Plan,
        needs: list[bool],
    ) -> None:
        """needs: whether the hidden rows, the head's weight, and its bias need a gradient."""
        self.plan = plan
        self.rows = len(hidden_ND)
        self.hidden_ND = hidden_ND.detach().to(plan.dtype)
        self.head = ComputeHead.of(head, plan.vocab_size, plan.dtype)
        self.targets_N = targets_N
        self.weights_N = None if row_weights_N is None else row_weights_N.to(plan.reduce_dtype)
        self.signal = signal if any(term.needs_teacher for term in plan.terms) else None
        self.teacher: ComputeHead | None = None
        self.folded: FoldedSignal | None = None
        if isinstance(self.signal, FoldedSignal):
            self.folded, self.signal = self.signal, self.signal.signal
        if isinstance(self.signal, DenseSignal):
            self.teacher = ComputeHead.of(self.signal.head, self._teacher_vocabulary(), plan.dtype)
            teacher_hidden_ND = self.signal.hidden_ND.detach().to(plan.dtype)
            self.signal = replace(self.signal, hidden_ND=teacher_hidden_ND)
        if isinstance(self.signal, FrozenHeadSignal):
            vector_ND = self.signal.vector_ND.to(plan.dtype)
            self.signal = replace(self.signal, vector_ND=vector_ND)
        self.groups, common = group_by_temperature(plan.terms)
        self.of_teacher = sum(each.coefficient for g in self.groups for each in g.of_teacher)
        self.factor = common * plan.factor * self.head.scale
        wide = hidden_ND.new_empty(0, dtype=plan.reduce_dtype)
        self.losses_MN = wide.new_zeros(len(plan.terms), self.rows)
        self.dhidden_ND = torch.empty_like(self.hidden_ND) if needs[0] else None
        self.dweight_VD: Tensor | None = None
        if needs[1]:
            sum_dtype = plan.head_sum_dtype(hidden_ND, head.weight_VD)
            self.dweight_VD = wide.new_empty(head.weight_VD.shape, dtype=sum_dtype)
            self.dweight_VD[plan.vocab_size if self.rows else 0 :].zero_()
        self.dbias_V = wide.new_zeros(len(head.weight_VD)) if needs[2] else None

    def run(self) -> None:
        device = self.hidden_ND.device
        chunk = self.plan.chunk(self.hidden_ND)
        self.kernels: RowKernels | None = None
        if runs_kernels(device) and self.folded is None:
            self.kernels = row_kernels(
                self.groups, self.head, self.teacher, self.signal, self.plan.reduce_dtype
            )
        vocab, dtype = self.plan.vocab_size, self.plan.dtype
        most = block = chunk  # Kernels need no scratch, so a chunk is one launch.
        if self.kernels is None:
            most = rows_per_part(chunk, dtype, device.type)
            block = rows_per_block(most, vocab, dtype, device.type)
        student_nV = self.hidden_ND.new_empty(chunk, vocab)
        teacher_mV: Tensor | None = None
        if self.teacher is not None:
            teacher_mV = student_nV.new_empty(most, self._teacher_vocabulary())
        self.space = Workspace((block, vocab), self.losses_MN)
        folding = None if self.folded is None else Folding(self.folded.fold, self.space)
        self.blocks = Blocks(
            self.groups, self.head, self.teacher, self.space, self.kernels, folding
        )
        grad = any(gradient is not None for gradient in self.gradients())
        for start in range(0, self.rows, chunk):
            rows = slice(start, min(start + chunk, self.rows))
            n = rows.stop - rows.start
            self.head.raw_logits(self.hidden_ND[rows], student_nV[:n])
            for first in range(start, rows.stop, most):
                part = slice(first, min(first + most, rows.stop))
                student_mV = student_nV[part.start - start : part.stop - start]
                self._run_part(part, student_mV, teacher_mV, block, grad=grad)
            if grad:
                self._carry_back(student_nV[:n], rows)
        if self.dhidden_ND is not None:
            self._scale_rows_(self.dhidden_ND, slice(None), self.factor)

    def _run_part(
        self, part: slice, student_mV: Tensor, teacher_mV: Tensor | None, block: int, *, grad: bool
    ) -> None:
        """Compute the losses of the rows `part`; overwrite their logits with ∂loss/∂logits.

        teacher_mV: a buffer for the teacher's logits.
        """
        rows = len(student_mV)
        if self.teacher is not None and isinstance(self.signal, DenseSignal):
            assert teacher_mV is not None
            self.teacher.raw_logits(self.signal.hidden_ND[part], teacher_mV[:rows])
        for low in range(0, rows, block):
            inside = slice(low, min(low + block, rows))
            here = slice(part.start + inside.start, part.start + inside.stop)
            self.blocks.run(
                student_mV[inside],
                self._teacher_block(teacher_mV, inside, here),
                None if self.targets_N is None else self.targets_N[here],
                self.losses_MN[:, here],
                covered_b=None if self.folded is None else self.folded.covered_N[here],
                grad=grad,
            )

    def _teacher_vocabulary(self) -> int:
        return self.plan.vocab_size if self.folded is None else len(self.folded.fold.teacher_W)

    def _teacher_block(self, teacher_mV: Tensor | None, inside: slice, here: slice) -> Teacher:
        """The signal for one block's rows: `inside` within its part, `here` within all rows."""
        signal = self.signal
        if isinstance(signal, LogitsSignal):
            logits_bV = signal.logits_NV[here, : self.plan.vocab_size].detach()
            if self.kernels is not None:
                return logits_bV
            buffer_bV = self.space.buffer("teacher", len(logits_bV))
            return buffer_bV.copy_(logits_bV).clamp_(min=IMPOSSIBLE)
        if isinstance(signal, SparseSignal):
            return replace(
                signal,
                ids_NK=signal.ids_NK[here].long(),
                log_probs_NK=signal.log_probs_NK[here].to(self.losses_MN.dtype),
                tail_N=signal.tail_N[here].to(self.losses_MN.dtype),
            )
        if isinstance(signal, SampledSignal):
            counts_bK = signal.counts_NK[here]
            return replace(signal, ids_NK=signal.ids_NK[here].long(), counts_NK=counts_bK)
        if isinstance(signal, FrozenHeadSignal):
            wide = self.losses_MN.dtype
            score_b = (signal.vector_ND[here].to(wide) * self.hidden_ND[here].to(wide)).sum(1)
            return ProjectedRows(score_b, signal.negative_entropy_N[here].to(wide))
        return None if teacher_mV is None else teacher_mV[inside]

    def _carry_back(self, dlogits_nV: Tensor, rows: slice) -> None:
        """Backpropagate ∂loss/∂logits to the hidden rows, the head's weight, and its bias.

        Row weights multiply the narrow side of each product, never the logits.
        """
        if self.dhidden_ND is not None:
            out_nD = self.dhidden_ND[rows]
            if isinstance(self.signal, FrozenHeadSignal):
                # Add before the product is rounded: for a good student, the two nearly cancel.
                vector_nD, beta = self.signal.vector_ND[rows], -self.of_teacher / self.head.scale
                torch.addmm(vector_nD, dlogits_nV, self.head.weight_VD, beta=beta, out=out_nD)
            else:
                product_(out_nD, dlogits_nV, self.head.weight_VD.T)
        vocab = self.plan.vocab_size
        if self.dweight_VD is not None:
            hidden_nD = self.hidden_ND[rows]
            if self.weights_N is not None:
                hidden_nD = self._scale_rows_(hidden_nD.clone(), rows, 1.0)
            accumulate_outer_(
                self.dweight_VD[:vocab], dlogits_nV, hidden_nD, self.factor, first=rows.start == 0
            )
        if self.dbias_V is not None:
            weights_n1 = self._scale_rows_(self.dbias_V.new_ones(len(dlogits_nV), 1), rows, 1.0)
            accumulate_columns_(self.dbias_V[:vocab], dlogits_nV, weights_n1, self.factor)

    def _scale_rows_(self, tensor_nX: Tensor, rows: slice, factor: float) -> Tensor:
        if self.weights_N is not None:
            tensor_nX.mul_((self.weights_N[rows, None] * factor).to(tensor_nX.dtype))
        elif factor != 1.0:
            tensor_nX.mul_(factor)
        return tensor_nX

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the hidden rows, the head's weight, and its bias."""
        return self.dhidden_ND, self.dweight_VD, self.dbias_V

    def term_sums(self) -> Tensor:
        """Each term's sum over rows, with row weights: [M]."""
        if self.weights_N is None:
            return self.losses_MN.sum(1)
        return self.losses_MN @ self.weights_N
