"""A block's losses and ∂loss/∂logits in one Triton kernel, for the usual objectives on a GPU.

PyTorch's operators pass over a block's logits a dozen times, which on a GPU takes longer than the
matrix products. Here a program processes one row: logits are read two or three times in their own
dtype, and written once. The formulas are those of `divergences`.

Shapes: b rows of a block, M terms, V vocabulary.
"""

from __future__ import annotations

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


def run(
    student_bV: Tensor,
    teacher_bV: Tensor,
    targets_b: Tensor | None,
    kind: str,
    parameter: float,
    *,
    student_scale: float,
    teacher_scale: float,
    coefficient: float,
    of_data: float,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    """Each row's divergence and its cross-entropy with `targets_b`, in float32.

    With `grad`, coefficient · ∂divergence/∂z (divided by the divergence's `gradient_factor`) +
    of_data · ∂cross-entropy/∂z is written over `student_bV`. z is a logit times its scale, which
    includes 1/T. kind: one of `triton_dispatch.KINDS`; parameter: its α or β.
    """
    assert student_bV.stride(1) == teacher_bV.stride(1) == 1
    rows, vocabulary = student_bV.shape
    values_b = student_bV.new_empty(rows, dtype=torch.float32)
    cross_b = values_b.new_zeros(rows)
    _row[(rows,)](
        student_bV,
        teacher_bV,
        values_b if targets_b is None else targets_b,
        values_b,
        cross_b,
        student_bV.stride(0),
        teacher_bV.stride(0),
        vocabulary,
        student_scale,
        teacher_scale,
        coefficient,
        of_data,
        parameter,
        KIND=kind,
        DATA=targets_b is not None,
        GRAD=grad,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return values_b, cross_b


@triton.jit
def _divergence(log_p, log_q, parameter, KIND: tl.constexpr):
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
def _scores(row, at, vocabulary, scale):
    logits = tl.load(row + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
    return tl.maximum(logits * scale, DONE)


@triton.jit
def _add(top, total, scores):
    """The running maximum and Σ exp(score − maximum), lane by lane."""
    higher = tl.maximum(top, scores)
    return higher, total * tl.exp(top - higher) + tl.exp(scores - higher)


@triton.jit
def _logsumexp(top, total):
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def _row(
    student,
    teacher,
    targets,
    values,
    cross,
    student_stride,
    teacher_stride,
    vocabulary,
    student_scale,
    teacher_scale,
    coefficient,
    of_data,
    parameter,
    KIND: tl.constexpr,
    DATA: tl.constexpr,
    GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, COLUMNS)

    top_s = tl.full([COLUMNS], DONE, tl.float32)
    top_t = tl.full([COLUMNS], DONE, tl.float32)
    total_s = tl.zeros([COLUMNS], tl.float32)
    total_t = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        at = start + lanes
        top_s, total_s = _add(top_s, total_s, _scores(student, at, vocabulary, student_scale))
        top_t, total_t = _add(top_t, total_t, _scores(teacher, at, vocabulary, teacher_scale))
    lse_s = _logsumexp(top_s, total_s)
    lse_t = _logsumexp(top_t, total_t)

    target = 0
    if DATA:
        target = tl.load(targets + row)
        z_target = tl.load(student + target).to(tl.float32) * student_scale
        tl.store(cross + row, lse_s - z_target)

    # Σh is −1 for forward KL; for the others, and without gradients, it needs a pass.
    value_sum = tl.zeros([COLUMNS], tl.float32)
    h_sum = tl.zeros([COLUMNS], tl.float32)
    if (KIND != "forward_kl") or (not GRAD):
        for start in range(0, vocabulary, COLUMNS):
            at = start + lanes
            log_q = _scores(student, at, vocabulary, student_scale) - lse_s
            log_p = _scores(teacher, at, vocabulary, teacher_scale) - lse_t
            value, h = _divergence(log_p, log_q, parameter, KIND)
            value_sum += value
            h_sum += h
    h_total = tl.sum(h_sum, 0)
    if KIND == "forward_kl":
        h_total = -1.0
    if GRAD:
        for start in range(0, vocabulary, COLUMNS):
            at = start + lanes
            log_q = _scores(student, at, vocabulary, student_scale) - lse_s
            log_p = _scores(teacher, at, vocabulary, teacher_scale) - lse_t
            value, h = _divergence(log_p, log_q, parameter, KIND)
            if KIND == "forward_kl":
                value_sum += value
            q = tl.exp(log_q)
            gradient = coefficient * (h - q * h_total)
            if DATA:
                gradient += of_data * (q - tl.where(at == target, 1.0, 0.0))
            tl.store(student + at, gradient.to(student.dtype.element_ty), mask=at < vocabulary)
    tl.store(values + row, tl.sum(value_sum, 0))
