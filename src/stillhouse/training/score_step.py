"""Scoring of all micro-batches of an optimizer step with a sharded teacher, before the student
runs.

The teacher's layers are then gathered only once for many micro-batches. Only the rows that predict
a supervised token are kept: on the host, unless the step has a single micro-batch.

Shapes: R windows, L tokens, N supervised rows, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from stillhouse.data.batches import Batch, join, positions_of
from stillhouse.signals import ChunkSignal, DenseSignal, FoldedSignal, Signal
from stillhouse.signals.signal_types import moved_rows
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.several_teachers import SeveralTeachers
from stillhouse.teachers.sharded_teacher import ShardedTeacher
from stillhouse.teachers.teacher import Teacher, TeacherView

HOST = torch.device("cpu")


def scores_steps(teacher: Teacher | None) -> bool:
    """Whether this teacher scores whole optimizer steps, because it (or each of several) is
    sharded."""
    if isinstance(teacher, SeveralTeachers):
        return all(scores_steps(each) for each in teacher.teachers)
    if isinstance(teacher, AlignedTeacher):
        return scores_steps(teacher.teacher)
    return isinstance(teacher, ShardedTeacher)


def score_step(
    teacher: Teacher,
    batches: Sequence[Batch],
    request: ActivationRequest,
    device: torch.device,
    *,
    rows: int,
) -> Iterator[TeacherView]:
    """Yield the teacher's answers to the micro-batches, in order, on the device.

    Micro-batches of up to `teacher.tokens_together` tokens in total are scored together, and all of
    them before the first answer. The processes of a torchrun must have the same number of
    micro-batches, with windows of the same length. rows: in a complete micro-batch; a process can
    have fewer.
    """
    if not batches:
        return
    together = max(1, teacher.tokens_together // (rows * batches[0]["labels"].shape[1]))
    kept: list[TeacherView] = []
    for start in range(0, len(batches), together):
        chunk = batches[start : start + together]
        view = teacher.answer(join(chunk), request)
        kept.extend(_parts(view, chunk, HOST if len(batches) > 1 else device))
    while kept:
        yield _moved(kept.pop(0), device)


def _parts(
    view: TeacherView, chunk: Sequence[Batch], device: torch.device
) -> Iterator[TeacherView]:
    """Split an answer into the answers to the chunk's micro-batches, on the device."""
    counts = [len(positions_of(batch)) for batch in chunk]
    sizes = [len(batch["labels"]) for batch in chunk]
    signals = [_split(signal, counts) for signal in view.signals]
    layers = {layer: hidden_ND.split(counts) for layer, hidden_ND in view.layers.items()}
    attention = {
        block: {name: each_RLW.split(sizes) for name, each_RLW in states.items()}
        for block, states in view.attention.items()
    }
    for i in range(len(chunk)):
        part = TeacherView(
            tuple(parts[i] for parts in signals),
            {layer: parts[i] for layer, parts in layers.items()},
            {
                block: {name: parts[i] for name, parts in states.items()}
                for block, states in attention.items()
            },
        )
        yield _moved(part, device)


def _split(signal: Signal | ChunkSignal, counts: Sequence[int]) -> list[DenseSignal | FoldedSignal]:
    """Split the signal's rows into parts with these counts."""
    dense = _dense(signal)
    parts = [replace(dense, hidden_ND=own) for own in dense.hidden_ND.split(counts)]
    if not isinstance(signal, FoldedSignal):
        return [*parts]
    covered, chunks = signal.covered_N.split(counts), split_chunks(signal.chunks, counts)
    return [
        replace(signal, signal=part, covered_N=own_N, chunks=own)
        for part, own_N, own in zip(parts, covered, chunks, strict=True)
    ]


def split_chunks(chunks: ChunkSignal | None, counts: Sequence[int]) -> list[ChunkSignal | None]:
    """Split chunks by parts of rows. All rows of a chunk are in the same part."""
    if chunks is None:
        return [None] * len(counts)
    found: list[ChunkSignal | None] = []
    rows_P, chunk_P, start = chunks.rows_P.cpu(), chunks.chunk_P.cpu(), 0
    for count in counts:
        own_P = (rows_P >= start) & (rows_P < start + count)
        own_C, place_P = chunk_P[own_P].unique(return_inverse=True)
        log_probs_C = chunks.log_probs_C.cpu()[own_C]
        found.append(ChunkSignal(rows_P[own_P] - start, place_P, log_probs_C))
        start += count
    return found


def _dense(signal: Signal | ChunkSignal) -> DenseSignal:
    """The dense signal that a sharded teacher returns, even with a different tokenizer."""
    inner = signal.signal if isinstance(signal, FoldedSignal) else signal
    assert isinstance(inner, DenseSignal)
    return inner


def _moved(view: TeacherView, device: torch.device) -> TeacherView:
    """Move the view's rows to the device. The heads stay where they are."""
    signals = tuple(moved_rows(signal, device) for signal in view.signals)
    layers = {layer: hidden_ND.to(device) for layer, hidden_ND in view.layers.items()}
    attention = {
        block: {name: each.to(device) for name, each in states.items()}
        for block, states in view.attention.items()
    }
    return TeacherView(signals, layers, attention)
