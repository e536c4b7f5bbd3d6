"""A block's losses and ∂loss/∂logits against a teacher's logits, in one Triton kernel.

PyTorch's operators pass over a block's logits a dozen times, which on a GPU takes longer than the
matrix products. Here a program processes one row: logits are read two or three times in their own
dtype, and written once; no copy of them in float32 exists. The formulas are those of `divergences`.
`triton_entries` has the rows of stored signals, and of data alone.

Shapes: b rows of a block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Logits of a row that are processed at a time."""
WARPS = 8
DONE = tl.constexpr(-1e30)
"""A logit of probability 0 that is finite, so that 0 · log 0 is 0 and not NaN."""
TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32: see `divergences._mixture`."""


@dataclass(frozen=True)
class Scales:
    """Factors of a kernel's call.

    student: of the student's logits, 1/T included; data: the same at T = 1, for cross-entropy.
    coefficient, of_data: of the two gradients.
    """

    student: float
    data: float
    coefficient: float
    of_data: float


def outputs(
    student_bV: Tensor, targets_b: Tensor | None, scales: Scales, *, grad: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Each row's divergence and cross-entropy, to be filled, and the arguments that all kernels
    have. targets_b: None if there is no cross-entropy, which is then 0."""
    assert student_bV.stride(1) == 1
    rows, vocabulary = student_bV.shape
    values_b = student_bV.new_empty(rows, dtype=torch.float32)
    cross_b = values_b.new_zeros(rows)
    return (
        values_b,
        cross_b,
        {
            "student": student_bV,
            "targets": values_b if targets_b is None else targets_b,
            "values": values_b,
            "cross": cross_b,
            "student_stride": student_bV.stride(0),
            "vocabulary": vocabulary,
            "student_scale": scales.student,
            "data_scale": scales.data,
            "coefficient": scales.coefficient,
            "of_data": scales.of_data,
            "DATA": targets_b is not None,
            "APART": targets_b is not None and scales.student != scales.data,
            "GRAD": grad,
            "COLUMNS": COLUMNS,
            "num_warps": WARPS,
        },
    )


def dense_rows(
    student_bV: Tensor,
    teacher_bV: Tensor,
    targets_b: Tensor | None,
    kind: str,
    parameter: float,
    scales: Scales,
    *,
    teacher_scale: float,
    teacher_floor: float,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    """Each row's divergence and its cross-entropy with `targets_b` (None: 0), in float32.

    With `grad`, coefficient · ∂divergence/∂z (divided by the divergence's `gradient_factor`) +
    of_data · ∂cross-entropy/∂z is written over `student_bV`, where z is a logit times its scale.
    kind: one of `triton_dispatch.KINDS`; parameter: its α or β. teacher_floor: the teacher's
    logits are at least this, before they are scaled.
    """
    if teacher_bV.stride(1) != 1:
        teacher_bV = teacher_bV.contiguous()
    values_b, cross_b, common = outputs(student_bV, targets_b, scales, grad=grad)
    _dense_row[(len(student_bV),)](
        teacher=teacher_bV,
        teacher_stride=teacher_bV.stride(0),
        teacher_scale=teacher_scale,
        teacher_floor=teacher_floor,
        parameter=parameter,
        KIND=kind,
        **common,
    )
    return values_b, cross_b


@triton.jit
def divergence(log_p, log_q, parameter, KIND: tl.constexpr):
    """The summands of the value and h = ∂value/∂log q, at some tokens."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == "forward_kl":
        value = p * (log_p - log_q)
        h = -p
    elif KIND == "reverse_kl":
        value = q * (log_q - log_p)
        h = value
    elif KIND == "total_variation":
        value = 0.5 * tl.abs(p - q)
        h = 0.5 * q * (tl.where(q > p, 1.0, 0.0) - tl.where(q < p, 1.0, 0.0))
    elif KIND == "jsd":
        log_m = tl.log(tl.maximum(parameter * p + (1.0 - parameter) * q, TINY))
        h = q * (log_q - log_m)
        value = parameter * p * (log_p - log_m) + (1.0 - parameter) * h
    elif KIND == "skew_forward_kl":
        m = tl.maximum(parameter * p + (1.0 - parameter) * q, TINY)
        value = p * (log_p - tl.log(m))
        h = (parameter - 1.0) * p * q / m
    else:
        tl.static_assert(KIND == "skew_reverse_kl")
        m = tl.maximum((1.0 - parameter) * p + parameter * q, TINY)
        value = q * (log_q - tl.log(m))
        h = value - parameter * q * (q / m)
    return value, h


@triton.jit
def raw_logits(row, at, vocabulary):
    """Logits as they are stored, in float32; −inf beyond the vocabulary."""
    return tl.load(row + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)


@triton.jit
def scaled(logits, scale):
    return tl.maximum(logits * scale, DONE)


@triton.jit
def add_scores(top, total, scores):
    """The running maximum and Σ exp(score − maximum), lane by lane."""
    higher = tl.maximum(top, scores)
    return higher, total * tl.exp(top - higher) + tl.exp(scores - higher)


@triton.jit
def logsumexp(top, total):
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def student_logsumexps(
    student, vocabulary, scale, data_scale, APART: tl.constexpr, COLUMNS: tl.constexpr
):
    """The logsumexp of a row at two scales, from one pass; without APART, the first one twice."""
    lanes = tl.arange(0, COLUMNS)
    top = tl.full([COLUMNS], DONE, tl.float32)
    top_d = tl.full([COLUMNS], DONE, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    total_d = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        raw = raw_logits(student, start + lanes, vocabulary)
        top, total = add_scores(top, total, scaled(raw, scale))
        if APART:
            top_d, total_d = add_scores(top_d, total_d, scaled(raw, data_scale))
    lse = logsumexp(top, total)
    lse_d = lse
    if APART:
        lse_d = logsumexp(top_d, total_d)
    return lse, lse_d


@triton.jit
def _teacher_scores(teacher, at, vocabulary, scale, floor):
    logits = tl.maximum(raw_logits(teacher, at, vocabulary), floor)
    return tl.where(at < vocabulary, scaled(logits, scale), DONE)


@triton.jit
def _dense_row(
    student,
    teacher,
    targets,
    values,
    cross,
    student_stride,
    teacher_stride,
    vocabulary,
    student_scale,
    data_scale,
    teacher_scale,
    teacher_floor,
    coefficient,
    of_data,
    parameter,
    KIND: tl.constexpr,
    DATA: tl.constexpr,
    APART: tl.constexpr,
    GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, COLUMNS)

    lse_s, lse_d = student_logsumexps(
        student, vocabulary, student_scale, data_scale, APART, COLUMNS
    )
    top_t = tl.full([COLUMNS], DONE, tl.float32)
    total_t = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        scores = _teacher_scores(teacher, start + lanes, vocabulary, teacher_scale, teacher_floor)
        top_t, total_t = add_scores(top_t, total_t, scores)
    lse_t = logsumexp(top_t, total_t)

    target = 0
    if DATA:
        target = tl.load(targets + row)
        z_target = tl.load(student + target).to(tl.float32) * data_scale
        tl.store(cross + row, lse_d - z_target)

    # Σh is −1 for forward KL; for the others, and without gradients, it needs a pass.
    value_sum = tl.zeros([COLUMNS], tl.float32)
    h_sum = tl.zeros([COLUMNS], tl.float32)
    if (KIND != "forward_kl") or (not GRAD):
        for start in range(0, vocabulary, COLUMNS):
            at = start + lanes
            log_q = scaled(raw_logits(student, at, vocabulary), student_scale) - lse_s
            scores = _teacher_scores(teacher, at, vocabulary, teacher_scale, teacher_floor)
            value, h = divergence(scores - lse_t, log_q, parameter, KIND)
            value_sum += value
            h_sum += h
    h_total = tl.sum(h_sum, 0)
    if KIND == "forward_kl":
        h_total = -1.0
    if GRAD:
        if DATA:
            tl.debug_barrier()  # every thread has read the target's logit
        for start in range(0, vocabulary, COLUMNS):
            at = start + lanes
            raw = raw_logits(student, at, vocabulary)
            log_q = scaled(raw, student_scale) - lse_s
            scores = _teacher_scores(teacher, at, vocabulary, teacher_scale, teacher_floor)
            value, h = divergence(scores - lse_t, log_q, parameter, KIND)
            if KIND == "forward_kl":
                value_sum += value
            q = tl.exp(log_q)
            gradient = coefficient * (h - q * h_total)
            if DATA:
                if APART:
                    q = tl.exp(scaled(raw, data_scale) - lse_d)
                gradient += of_data * (q - tl.where(at == target, 1.0, 0.0))
            tl.store(student + at, gradient.to(student.dtype.element_ty), mask=at < vocabulary)
    tl.store(values + row, tl.sum(value_sum, 0))
