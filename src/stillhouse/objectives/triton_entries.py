"""Triton kernels for a block's losses and ∂loss/∂logits against stored signals, or only the data.

As in `triton_kernel`, one program processes one row. It reads the row's logits twice and writes
them once; the K tokens of a stored row stay in registers. For the formulas see `sparse` and, for
counted tokens, `dense`.

Shapes: b rows of a block, K entries of a row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from stillhouse.objectives.triton_kernel import (
    DONE,
    TINY,
    divergence,
    raw_logits,
    scaled,
    student_logsumexps,
)
from stillhouse.signals import SampledSignal, SparseSignal

LOG_P_FLOOR = tl.constexpr(-100.0)
LOG_Q_FLOOR = tl.constexpr(-1000.0)
"""Stand-ins for log 0, as in `sparse`."""


def sparse_rows(common: dict[str, Any], teacher: SparseSignal, kind: str, parameter: float) -> None:
    """Same as `dense_rows`, over K < V tokens and their tail. Overwrites the student's logits even
    without gradients."""
    rows, entries = teacher.ids_NK.shape
    assert entries < common["vocabulary"]
    _sparse_row[(rows,)](
        ids=teacher.ids_NK.contiguous(),
        log_probs=teacher.log_probs_NK.contiguous(),
        tails=teacher.tail_N.contiguous(),
        entries=entries,
        parameter=parameter,
        KIND=kind,
        BUCKETS=triton.next_power_of_2(entries + 1),
        **common,
    )


def counted_rows(common: dict[str, Any], teacher: SampledSignal | None) -> None:
    """Compute each row's −Σ share · log q over counted tokens, and its cross-entropy.

    A share is a count divided by the row's sum. Without counts, the first value is the row's
    logsumexp, and its gradient is the softmax; the caller adds the part that is linear in the
    logits.
    """
    entries = 0 if teacher is None else teacher.ids_NK.shape[1]
    _counted_row[(len(common["student"]),)](
        ids=common["values"] if teacher is None else teacher.ids_NK.contiguous(),
        counts=common["values"] if teacher is None else teacher.counts_NK.contiguous(),
        entries=entries,
        PLACES=triton.next_power_of_2(entries) if entries else 0,
        **common,
    )


@triton.jit
def _sparse_row(
    student,
    ids,
    log_probs,
    tails,
    targets,
    values,
    cross,
    student_stride,
    entries,
    vocabulary,
    student_scale,
    data_scale,
    coefficient,
    of_data,
    parameter,
    KIND: tl.constexpr,
    DATA: tl.constexpr,
    APART: tl.constexpr,
    GRAD: tl.constexpr,
    BUCKETS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    ids += row * entries
    log_probs += row * entries
    lanes = tl.arange(0, COLUMNS)
    places = tl.arange(0, BUCKETS)
    is_tail = places == entries

    # The logits of the K tokens leave the row, so that what remains is the tail.
    token = tl.load(ids + places, mask=places < entries, other=0)
    new = (places == 0) | (token != tl.load(ids))  # short rows repeat their first token
    of_token = (places < entries) & new
    raw_k = tl.load(student + token, mask=of_token, other=float("-inf")).to(tl.float32)
    target = 0
    raw_target = 0.0
    if DATA:
        target = tl.load(targets + row)
        raw_target = tl.load(student + target).to(tl.float32)
    tl.debug_barrier()
    none = tl.full([BUCKETS], float("-inf"), student.dtype.element_ty)
    tl.store(student + token, none, mask=of_token)
    tl.debug_barrier()
    lse_tail, lse_tail_d = student_logsumexps(
        student, vocabulary, student_scale, data_scale, APART, COLUMNS
    )

    z = tl.where(is_tail, lse_tail, tl.where(of_token, scaled(raw_k, student_scale), DONE))
    highest = tl.max(z, 0)
    lse = highest + tl.log(tl.sum(tl.exp(z - highest), 0))
    lse_d = lse
    if APART:
        z_d = tl.where(is_tail, lse_tail_d, tl.where(of_token, scaled(raw_k, data_scale), DONE))
        highest_d = tl.max(z_d, 0)
        lse_d = highest_d + tl.log(tl.sum(tl.exp(z_d - highest_d), 0))
    log_q = tl.maximum(z - lse, LOG_Q_FLOOR)
    log_p = tl.load(log_probs + places, mask=of_token, other=float("-inf")).to(tl.float32)
    tail = tl.load(tails + row).to(tl.float32)
    log_tail = tl.where(tail > TINY, tl.log(tl.maximum(tail, TINY)), LOG_P_FLOOR)
    log_p = tl.where(is_tail, log_tail, tl.maximum(log_p, LOG_P_FLOOR))
    value, h = divergence(log_p, log_q, parameter, KIND)
    is_bucket = of_token | is_tail
    tl.store(values + row, tl.sum(tl.where(is_bucket, value, 0.0), 0))
    if DATA:
        tl.store(cross + row, lse_d - raw_target * data_scale)
    if GRAD:
        q = tl.exp(log_q)
        gradient_k = coefficient * (h - q * tl.sum(tl.where(is_bucket, h, 0.0), 0))
        if DATA and not APART:
            gradient_k += of_data * q
        of_tail = tl.sum(tl.where(is_tail, gradient_k, 0.0), 0)
        for start in range(0, vocabulary, COLUMNS):
            at = start + lanes
            raw = raw_logits(student, at, vocabulary)
            gradient = of_tail * tl.exp(scaled(raw, student_scale) - lse_tail)
            if DATA:
                if APART:
                    gradient += of_data * tl.exp(scaled(raw, data_scale) - lse_d)
                gradient -= tl.where(at == target, of_data, 0.0)
            tl.store(student + at, gradient.to(student.dtype.element_ty), mask=at < vocabulary)
        if DATA:
            if APART:
                gradient_k += of_data * tl.exp(scaled(raw_k, data_scale) - lse_d)
            gradient_k -= tl.where(token == target, of_data, 0.0)
        tl.debug_barrier()  # The K tokens' gradients replace what the pass wrote there.
        tl.store(student + token, gradient_k.to(student.dtype.element_ty), mask=of_token)


@triton.jit
def _counted_row(
    student,
    ids,
    counts,
    targets,
    values,
    cross,
    student_stride,
    entries,
    vocabulary,
    student_scale,
    data_scale,
    coefficient,
    of_data,
    DATA: tl.constexpr,
    APART: tl.constexpr,
    GRAD: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    lanes = tl.arange(0, COLUMNS)
    lse, lse_d = student_logsumexps(student, vocabulary, student_scale, data_scale, APART, COLUMNS)
    score = 0.0
    if PLACES > 0:
        ids += row * entries
        counts += row * entries
        places = tl.arange(0, PLACES)
        inside = places < entries
        token = tl.load(ids + places, mask=inside, other=0)
        count = tl.load(counts + places, mask=inside, other=0).to(tl.float32)
        all_counts = tl.sum(count, 0)
        raw_k = tl.load(student + token, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(count / all_counts * (raw_k * student_scale), 0)
    tl.store(values + row, lse - score)
    target = 0
    if DATA:
        target = tl.load(targets + row)
        raw_target = tl.load(student + target).to(tl.float32)
        tl.store(cross + row, lse_d - raw_target * data_scale)
    if GRAD:
        tl.debug_barrier()  # Every thread has read what the pass overwrites.
        for start in range(0, vocabulary, COLUMNS):
            at = start + lanes
            raw = raw_logits(student, at, vocabulary)
            q = tl.exp(scaled(raw, student_scale) - lse)
            gradient = coefficient * q
            if DATA:
                if APART:
                    q = tl.exp(scaled(raw, data_scale) - lse_d)
                gradient += of_data * (q - tl.where(at == target, 1.0, 0.0))
            tl.store(student + at, gradient.to(student.dtype.element_ty), mask=at < vocabulary)
        if PLACES > 0:
            # A token can be drawn several times: each of its places gets the sum of its counts.
            merged = tl.zeros([PLACES], tl.float32)
            for place in range(entries):
                same = token == tl.load(ids + place)
                merged += tl.where(same, tl.load(counts + place).to(tl.float32), 0.0)
            q_k = tl.exp(raw_k * student_scale - lse)
            gradient_k = coefficient * (q_k - merged / all_counts)
            if DATA:
                if APART:
                    q_k = tl.exp(raw_k * data_scale - lse_d)
                gradient_k += of_data * (q_k - tl.where(token == target, 1.0, 0.0))
            tl.debug_barrier()  # These replace what the pass wrote there.
            tl.store(student + token, gradient_k.to(student.dtype.element_ty), mask=inside)
