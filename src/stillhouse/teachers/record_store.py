"""Recording of a teacher's signals for a text in a signal store.

Shapes: R windows, L tokens, N supervised rows, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stillhouse.data.batches import Batch, collate, own_share, rows_in_order, with_labels
from stillhouse.data.shift import IGNORED
from stillhouse.data.windows import WindowSet
from stillhouse.errors import SignalError
from stillhouse.hardware import HeapLimit
from stillhouse.launch import leads, process_index, world_size
from stillhouse.processes import lost_process, open_group, wait_for_all
from stillhouse.progress import bar
from stillhouse.signals import ChunkSignal, DenseSignal, FoldedSignal, HiddenSignal, LMHead, Signal
from stillhouse.signals.encode import Statistics
from stillhouse.signals.encoded_rows import Rows
from stillhouse.signals.encodings import Encoding, Hidden, Threshold
from stillhouse.signals.folded_store import ROOTS, event_logits, fold_sha256, write_fold
from stillhouse.signals.lm_head import head_logits
from stillhouse.signals.manifest import SETTINGS, Manifest, Settings, read_manifest, read_settings
from stillhouse.signals.record import Recorder
from stillhouse.signals.segments import Segments, find_segments
from stillhouse.signals.signals_config import SignalsRecipe, ThresholdSignals
from stillhouse.signals.tune_threshold import top_probabilities, tune_threshold
from stillhouse.signals.writer import StoreWriter, finish_store
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.backbone import trim_head
from stillhouse.teachers.roots import Roots
from stillhouse.teachers.shared_vocabulary import tokenizer_identity
from stillhouse.teachers.stored_head import linear_map
from stillhouse.teachers.teacher import Teacher, TeacherView

TUNING_WINDOWS = 16


def chosen_encoding(
    section: SignalsRecipe,
    planned: Encoding,
    teacher: Teacher,
    text: WindowSet,
    *,
    temperature: float,
    out: Path,
) -> Encoding:
    """The encoding that a recipe describes. A store that was already begun keeps its encoding;
    otherwise a threshold is tuned."""
    if (out / SETTINGS).exists():
        return read_settings(out).encoding
    if isinstance(section.encoding, ThresholdSignals):
        return tuned_threshold(teacher, text, temperature=temperature, size=section.encoding.bytes)
    return planned


def identity_of(teacher: Teacher) -> dict[str, str]:
    """What a store of this teacher's signals belongs to: the teacher, the student's tokenizer, and,
    if the teacher has a different tokenizer, that tokenizer and the shared roots."""
    found = {"teacher": teacher.fingerprint or teacher.described}
    if teacher.tokenizer is not None:
        found |= tokenizer_identity(teacher.tokenizer)
    if isinstance(teacher, AlignedTeacher):
        found |= folded_identity(teacher.teacher.tokenizer, teacher.roots)
    return found


def folded_identity(teacher_tokenizer: Any, roots: Roots) -> dict[str, str]:
    """What else the store of a teacher with a different tokenizer belongs to."""
    own = tokenizer_identity(teacher_tokenizer)
    return {"teacher_tokenizer": own["tokenizer"], ROOTS: fold_sha256(roots.fold)}


def events_of(teacher: Teacher) -> int:
    """The number of events in a store of this teacher's signals: its tokens, or the roots and "not
    covered"."""
    if isinstance(teacher, AlignedTeacher):
        return teacher.roots.events
    return teacher.vocabulary


def record(
    teacher: Teacher,
    texts: Sequence[WindowSet],
    settings: Settings,
    out: Path,
    *,
    student_head: LMHead | None = None,
    alone: bool = False,
) -> Manifest:
    """Record the teacher's signal for every supervised token, or resume an unfinished store.

    Under torchrun, every process calls this and scores its share of the batches; with `alone`, one
    process scores all of them. student_head: for the encoding frozen_head only.
    Raises SignalError if `out` was begun with different settings. StoreError if it is damaged or
    the disk is full; signals recorded so far are kept.
    """
    recorder, heap = recorder_of(settings, student_head), HeapLimit()
    batches = chain.from_iterable(rows_in_order(text, teacher.tokens_together) for text in texts)
    total = sum(len(text) * len(text[0]["labels"]) for text in texts)
    process, processes = (0, 1) if alone else (process_index(), world_size())
    if not alone:
        open_group()
    with lost_process(processes), StoreWriter(out, settings) as writer:
        if process == 0 and isinstance(teacher, AlignedTeacher):
            write_fold(teacher.roots.fold, out)
        with bar("signals", total=total) as advance:
            for rows in own_share(batches, process, processes):
                batch = collate(rows)
                segments = segments_of(batch)
                missing_S = writer.missing(segments)
                if missing_S.any():
                    encoded = encoded_answer(teacher, recorder, batch, segments, missing_S)
                    writer.add(segments.only(missing_S), *encoded)
                elif teacher.collective:
                    teacher.answer(batch)  # the other processes need its part of the weights
                advance(batch["labels"].numel() * processes)
                heap.check()
        if alone:
            return writer.finish()
        writer.flush()
        wait_for_all()
        if leads():
            finish_store(out)
        wait_for_all()
        manifest = read_manifest(out)
        wait_for_all()  # the main process may move the folder once it returns
        return manifest


def recorder_of(settings: Settings, student_head: LMHead | None) -> Recorder:
    """The recorder for a store's settings. student_head: for frozen_head only."""
    linear = None if student_head is None else linear_map(student_head, settings.vocabulary)
    return Recorder(settings, linear)


def encoded_answer(
    teacher: Teacher,
    recorder: Recorder,
    batch: Batch,
    segments: Segments,
    chosen_S: NDArray[np.bool_],
) -> tuple[Rows, Statistics]:
    """The teacher's signal for the chosen segments of a batch, encoded by the recorder."""
    labels_RL = batch["labels"].clone()
    learned_RL = labels_RL[:, 1:] != IGNORED  # in the order of the segments' rows
    unchosen_N = torch.from_numpy(~segments.chosen_rows(chosen_S)).to(labels_RL.device)
    labels_RL[:, 1:][learned_RL.masked_scatter(learned_RL, unchosen_N)] = IGNORED
    settings = recorder.settings
    layers = settings.encoding.layers if isinstance(settings.encoding, Hidden) else ()
    view = teacher.answer(with_labels(batch, labels_RL), ActivationRequest(frozenset(layers)))
    answer: Signal | HiddenSignal
    if layers:
        answer = HiddenSignal({layer: view.layers[layer] for layer in layers})
    else:
        answer = only_signal(view, teacher)
    if isinstance(answer, DenseSignal):
        answer = replace(answer, head=trim_head(answer.head, settings.vocabulary))
    return recorder.encode(segments.only(chosen_S), answer)


def only_signal(view: TeacherView, teacher: Teacher) -> Signal:
    """The view's signal. Raises SignalError if there are several, or only likelihoods of chunks."""
    if len(view.signals) != 1:
        raise SignalError(
            f"{teacher.described} returns {len(view.signals)} signals, and a store has only one",
            fix="record a store for each teacher",
        )
    (signal,) = view.signals
    if isinstance(signal, ChunkSignal):
        raise SignalError(
            f"{teacher.described} returns only likelihoods of chunks, which a store cannot contain",
            fix="train with this teacher without a store",
        )
    return signal


def segments_of(batch: Batch) -> Segments:
    """The batch's segments, the keys of a store's rows."""
    return find_segments(batch["input_ids"], batch["labels"], batch["position_ids"])


def tuned_threshold(
    teacher: Teacher, text: WindowSet, *, temperature: float, size: float
) -> Threshold:
    """Tune the threshold on a sample of the text, so that a row takes `size` bytes on average.

    Raises SignalError if no threshold does, or if the teacher has no full distributions.
    """
    step = max(1, len(text) // TUNING_WINDOWS)
    sample = []
    for index in range(0, len(text), step):
        signal = only_signal(teacher.answer(collate([text[index]])), teacher)
        if not isinstance(signal, DenseSignal | FoldedSignal):
            raise SignalError(
                f"{teacher.described} does not return full distributions, which threshold needs",
                where="signals.encoding",
                fix="use signals.encoding.kind: top_k",
            )
        if isinstance(signal, FoldedSignal):
            logits_NV = event_logits(signal, slice(None), temperature)
        else:
            logits_NV = head_logits(trim_head(signal.head, teacher.vocabulary), signal.hidden_ND)
        if len(logits_NV):
            sample.append(top_probabilities(logits_NV, temperature).cpu())
    try:
        return tune_threshold(torch.cat(sample), events_of(teacher), size=size).encoding
    except SignalError as error:
        where = "signals.encoding.bytes"
        raise SignalError(error.what, where=where, fix=error.fix) from None
