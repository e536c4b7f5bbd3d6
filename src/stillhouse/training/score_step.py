"""Scoring of all micro-batches of an optimizer step with a sharded teacher, before the student
runs.

The teacher's layers are then gathered only once for many micro-batches. Only the rows that predict
a supervised token are kept: on the host, unless the step has a single micro-batch.

Shapes: R windows, L tokens, N supervised rows, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from stillhouse.data.batches import Batch, join, positions_of
from stillhouse.signals import ChunkSignal, DenseSignal, FoldedSignal, Signal
from stillhouse.signals.signal_types import inner_signal, moved_rows
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
    parts_of_rows = _slices(len(positions_of(batch)) for batch in chunk)
    parts_of_windows = _slices(len(batch["labels"]) for batch in chunk)
    for rows, windows in zip(parts_of_rows, parts_of_windows, strict=True):
        part = TeacherView(
            tuple(_cut(signal, rows) for signal in view.signals),
            {layer: hidden_ND[rows] for layer, hidden_ND in view.layers.items()},
            {
                block: {name: each_RLW[windows] for name, each_RLW in states.items()}
                for block, states in view.attention.items()
            },
        )
        yield _moved(part, device)


def _slices(counts: Iterable[int]) -> Iterator[slice]:
    return (slice(*ends) for ends in pairwise(accumulate(counts, initial=0)))


def _cut(signal: Signal | ChunkSignal, rows: slice) -> DenseSignal | FoldedSignal:
    """These rows of the dense signal that a sharded teacher returns, even with a different
    tokenizer."""
    dense = inner_signal(signal)
    assert isinstance(dense, DenseSignal)
    part = replace(dense, hidden_ND=dense.hidden_ND[rows])
    if not isinstance(signal, FoldedSignal):
        return part
    chunks = None if signal.chunks is None else cut_chunks(signal.chunks, rows)
    return replace(signal, signal=part, covered_N=signal.covered_N[rows], chunks=chunks)


def cut_chunks(chunks: ChunkSignal, rows: slice) -> ChunkSignal:
    """The chunks in these rows, which contain all rows of a chunk or none."""
    rows_P, chunk_P = chunks.rows_P.cpu(), chunks.chunk_P.cpu()
    own_P = (rows_P >= rows.start) & (rows_P < rows.stop)
    own_C, place_P = chunk_P[own_P].unique(return_inverse=True)
    return ChunkSignal(rows_P[own_P] - rows.start, place_P, chunks.log_probs_C.cpu()[own_C])


def _moved(view: TeacherView, device: torch.device) -> TeacherView:
    """Move the view's rows to the device. The heads stay where they are."""
    signals = tuple(moved_rows(signal, device) for signal in view.signals)
    layers = {layer: hidden_ND.to(device) for layer, hidden_ND in view.layers.items()}
    attention = {
        block: {name: each.to(device) for name, each in states.items()}
        for block, states in view.attention.items()
    }
    return TeacherView(signals, layers, attention)
