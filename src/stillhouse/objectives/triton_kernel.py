"""Triton kernel for a block's losses and ∂loss/∂logits against a teacher's logits.

PyTorch's operators make about a dozen passes over a block's logits, which on a GPU takes longer
than the matrix products. Here, one program processes one row: it reads the logits two or three
times in their own dtype and writes them once, without a float32 copy. For the formulas see
`divergences`; for stored signals and rows with only data, see `triton_entries`.

Shapes: b rows of a block, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Number of a row's logits that are processed at a time."""
WARPS = 8
DONE = tl.constexpr(-1e30)
"""A finite logit whose probability is 0, so that 0 · log 0 is 0 and not NaN."""
TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32; see `divergences._mixture`."""


def arguments(
    student_bV: Tensor, targets_b: Tensor | None, *, grad: bool, **factors: float
) -> dict[str, Any]:
    """The arguments common to all kernels, which fill `values` and `cross`: each row's divergence
    and its cross-entropy with `targets_b` (None: 0), in float32.

    With `grad`, they overwrite `student_bV` with coefficient · ∂divergence/∂z (divided by the
    divergence's `gradient_factor`) + of_data · ∂cross-entropy/∂z, where z is a logit times its
    scale.

    factors: student_scale of the student's logits, including 1/T; data_scale, the same at T = 1,
    for cross-entropy; coefficient; and of_data.
    """
    assert student_bV.stride(1) == 1
    rows, vocabulary = student_bV.shape
    values_b = student_bV.new_empty(rows, dtype=torch.float32)
    return {
        "student": student_bV,
        "targets": values_b if targets_b is None else targets_b,
        "values": values_b,
        "cross": values_b.new_zeros(rows),
        "student_stride": student_bV.stride(0),
        "vocabulary": vocabulary,
        **factors,
        "DATA": targets_b is not None,
        "APART": targets_b is not None and factors["student_scale"] != factors["data_scale"],
        "GRAD": grad,
        "COLUMNS": COLUMNS,
        "num_warps": WARPS,
    }


def dense_rows(
    common: dict[str, Any], teacher_bV: Tensor, kind: str, parameter: float, **factors: float
) -> None:
    """Compare each row with a teacher's logits. common: see `arguments`.

    kind: one of `triton_dispatch.KINDS`. parameter: the divergence's α or β. factors: teacher_scale
    of the teacher's logits, and teacher_floor, their lower bound before they are scaled.
    """
    if teacher_bV.stride(1) != 1:
        teacher_bV = teacher_bV.contiguous()
    _dense_row[(len(teacher_bV),)](
        teacher=teacher_bV,
        teacher_stride=teacher_bV.stride(0),
        parameter=parameter,
        KIND=kind,
        **factors,
        **common,
    )


@triton.jit
def divergence(log_p, log_q, parameter, KIND: tl.constexpr):
    """Each token's summand of the value, and its h = ∂value/∂log q."""
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
    """Stored logits, converted to float32; −inf beyond the vocabulary."""
    return tl.load(row + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)


@triton.jit
def scaled(logits, scale):
    return tl.maximum(logits * scale, DONE)


@triton.jit
def add_scores(top, total, scores):
    """Update the running maximum and Σ exp(score − maximum), lane by lane."""
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
    """A row's logsumexp at two scales, from one pass; without APART, the first one twice."""
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

    # For forward KL with gradients, Σh is known to be −1; everything else needs an extra pass.
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
            tl.debug_barrier()  # Every thread has read the target's logit.
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
