"""Asks a teacher once about every window, and writes its answers to a signal store.

Shapes: R windows, L tokens, N supervised rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.data.shift import predicting
from stillhouse.data.windows import WindowSet, collate
from stillhouse.progress import bar
from stillhouse.signals import DenseSignal, HiddenSignal, LMHead
from stillhouse.signals.encode import Statistics
from stillhouse.signals.encoded_rows import Rows
from stillhouse.signals.encodings import Encoding, Hidden, Threshold
from stillhouse.signals.lm_head import head_logits
from stillhouse.signals.manifest import SETTINGS, Manifest, Settings, read_settings
from stillhouse.signals.record import Recorder
from stillhouse.signals.segments import Segments, find_segments
from stillhouse.signals.signals_config import SignalsRecipe, ThresholdSignals
from stillhouse.signals.store import Store
from stillhouse.signals.tune_threshold import likeliest_probabilities, tune_threshold
from stillhouse.signals.writer import StoreWriter
from stillhouse.teachers.backbone import dense_signal
from stillhouse.teachers.stored_head import linear_map
from stillhouse.teachers.views import Wanted, look

Batch = dict[str, Tensor]
Encoded = tuple[Rows, Statistics]
Ask = Callable[[Batch, Segments, NDArray[np.bool_]], Encoded]
"""From a batch, its segments and which of them are wanted to the encoded rows of these."""

TUNING_WINDOWS = 16
SCORED_TOGETHER = 2048
"""Tokens in one forward pass."""


def chosen_encoding(
    section: SignalsRecipe,
    planned: Encoding,
    teacher: Any,
    windows: WindowSet,
    *,
    vocabulary: int,
    temperature: float,
    out: Path,
) -> Encoding:
    """The encoding that a recipe asks for; a threshold is tuned, or as it was when the store was
    begun."""
    if (out / SETTINGS).exists():
        return read_settings(out).encoding
    if isinstance(section.encoding, ThresholdSignals):
        return tuned_threshold(
            teacher,
            windows,
            vocabulary=vocabulary,
            temperature=temperature,
            size=section.encoding.bytes,
        )
    return planned


def score(
    ask: Ask,
    texts: Sequence[WindowSet],
    settings: Settings,
    out: Path,
    *,
    together: int | None = None,
) -> Manifest:
    """Records the teacher's signal for every supervised token; goes on with a store half done.

    together: tokens that are asked about at a time.

    Raises SignalError where `out` was begun with other settings, StoreError where it is damaged or
    the disk is full; what was recorded stays.
    """
    total = sum(_tokens(windows) for windows in texts)
    with StoreWriter(out, settings) as writer, bar("signals", total=total) as advance:
        for batch in chain(*(_batches(windows, together or SCORED_TOGETHER) for windows in texts)):
            segments = segments_of(batch)
            missing_S = writer.missing(segments)
            if missing_S.any():
                writer.add(segments.only(missing_S), *ask(batch, segments, missing_S))
            advance(batch["labels"].numel())
        return writer.finish()


def local_teacher(teacher: Any, settings: Settings, student_head: LMHead | None = None) -> Ask:
    """Asks a model in eval mode on the device where it is; encodes as a store's settings say.

    student_head: for the encoding frozen_head only.
    """
    projection = None if student_head is None else linear_map(student_head, settings.vocabulary)
    recorder = Recorder(settings, projection)
    device = next(teacher.parameters()).device

    def ask(batch: Batch, segments: Segments, wanted_S: NDArray[np.bool_]) -> Encoded:
        chosen_RL = predicting(batch["labels"])
        chosen_RL[chosen_RL.clone()] = torch.from_numpy(segments.chosen_rows(wanted_S)).to(
            chosen_RL.device
        )
        asked = batch["input_ids"].to(device), batch["position_ids"].to(device)
        chosen_RL = chosen_RL.to(device)
        answer: DenseSignal | HiddenSignal
        if isinstance(settings.encoding, Hidden):
            answer = hidden_signal(teacher, *asked, chosen_RL, settings.encoding.layers)
        else:
            answer = dense_signal(teacher, *asked, chosen_RL, vocabulary=settings.vocabulary)
        return recorder.encode(segments.only(wanted_S), answer)

    return ask


@torch.no_grad()
def hidden_signal(
    model: Any,
    input_ids_RL: Tensor,
    position_ids_RL: Tensor | None,
    chosen_RL: Tensor,
    layers: tuple[int, ...],
) -> HiddenSignal:
    """As `dense_signal`, the hidden states after some layers: see `views` for their numbers."""
    seen = look(model, input_ids_RL, position_ids_RL, Wanted(frozenset(layers)))
    return HiddenSignal({layer: seen.layers[layer][chosen_RL] for layer in layers})


def segments_of(batch: Batch) -> Segments:
    return find_segments(batch["input_ids"], batch["labels"], batch["position_ids"])


def lacking_tokens(store: Store, windows: WindowSet) -> int:
    """How many of the windows' supervised tokens the store has no row for."""
    lacking = 0
    for batch in _batches(windows, SCORED_TOGETHER):
        segments = segments_of(batch)
        lacking += int(segments.rows_S[store.missing(segments)].sum())
    return lacking


def tuned_threshold(
    teacher: Any, windows: WindowSet, *, vocabulary: int, temperature: float, size: float
) -> Threshold:
    """The threshold at which a row takes `size` bytes on average, from some of the windows.

    Raises SignalError where no threshold gives that.
    """
    device = next(teacher.parameters()).device
    step = max(1, len(windows) // TUNING_WINDOWS)
    sample = []
    for index in range(0, len(windows), step):
        batch = {name: row[None].to(device) for name, row in windows[index].items()}
        answer = dense_signal(
            teacher,
            batch["input_ids"],
            batch["position_ids"],
            predicting(batch["labels"]),
            vocabulary=vocabulary,
        )
        if len(answer.hidden_ND):
            logits_NV = head_logits(answer.head, answer.hidden_ND)
            sample.append(likeliest_probabilities(logits_NV, temperature).cpu())
    return tune_threshold(torch.cat(sample), vocabulary, size=size).encoding


def _batches(windows: WindowSet, tokens: int) -> Iterator[Batch]:
    together = max(1, tokens // len(windows[0]["labels"]))
    for start in range(0, len(windows), together):
        stop = min(start + together, len(windows))
        yield collate([windows[index] for index in range(start, stop)])


def _tokens(windows: WindowSet) -> int:
    return len(windows) * len(windows[0]["labels"])
