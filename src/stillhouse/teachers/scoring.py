"""Asks a teacher once about every window, and writes its answers to a signal store.

Shapes: R windows, L tokens, N supervised rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.data import WindowSet, collate, predicting
from stillhouse.progress import bar
from stillhouse.recipe.schema import (
    SampledSignals,
    SignalsRecipe,
    StratifiedSignals,
    ThresholdSignals,
    TopKSignals,
    TopPSignals,
)
from stillhouse.signals.encodings import (
    Encoding,
    EntryEncoding,
    Sampled,
    Stratified,
    Threshold,
    TopK,
    TopP,
)
from stillhouse.signals.head import head_logits
from stillhouse.signals.manifest import SETTINGS, Manifest, Settings, read_settings
from stillhouse.signals.record import Recorder
from stillhouse.signals.segments import find_segments
from stillhouse.signals.tune import likeliest_probabilities, tune_threshold
from stillhouse.signals.writer import StoreWriter
from stillhouse.teachers.backbone import dense_signal

TUNING_WINDOWS = 16
SCORED_TOGETHER = 2048
"""Tokens in one forward pass."""


def encoding_of(section: SignalsRecipe) -> EntryEncoding:
    """The store's encoding. A threshold's tau is a guess that `record` tunes to the asked size."""
    encoding = section.encoding
    match encoding:
        case ThresholdSignals():
            return Threshold(0.02)
        case TopKSignals():
            return TopK(encoding.k)
        case TopPSignals():
            return TopP(encoding.p, encoding.most)
        case SampledSignals():
            return Sampled(encoding.draws)
        case StratifiedSignals():
            return Stratified(encoding.k, encoding.draws)


def record(
    section: SignalsRecipe,
    teacher: Any,
    windows: WindowSet,
    *,
    vocabulary: int,
    temperature: float,
    identity: Mapping[str, str],
    seed: int,
    out: Path,
) -> Manifest:
    """`score`, with the encoding that a recipe asks for."""
    if (out / SETTINGS).exists():
        encoding: Encoding = read_settings(out).encoding  # as tuned when the store was begun
    elif isinstance(section.encoding, ThresholdSignals):
        encoding = tuned_threshold(
            teacher,
            windows,
            vocabulary=vocabulary,
            temperature=temperature,
            size=section.encoding.bytes,
        )
    else:
        encoding = encoding_of(section)
    settings = Settings(encoding, vocabulary, identity, temperature, seed)
    return score(teacher, windows, settings, out)


def score(teacher: Any, windows: WindowSet, settings: Settings, out: Path) -> Manifest:
    """Records the teacher's signal for every supervised token; goes on with a store half done.

    teacher: a model in eval mode, on the device where it is to run.
    Raises SignalError where `out` was begun with other settings, StoreError where it is damaged or
    the disk is full; what was recorded stays.
    """
    recorder = Recorder(settings)
    device = next(teacher.parameters()).device
    with StoreWriter(out, settings) as writer, bar("signals", total=_tokens(windows)) as advance:
        for batch in _batches(windows):
            labels_RL = batch["labels"]
            segments = find_segments(batch["input_ids"], labels_RL, batch["position_ids"])
            missing_S = writer.missing(segments)
            wanted = segments.only(missing_S)
            if wanted.rows:
                chosen_RL = predicting(labels_RL)
                chosen_RL[chosen_RL.clone()] = torch.from_numpy(segments.chosen_rows(missing_S))
                answer = dense_signal(
                    teacher,
                    batch["input_ids"].to(device),
                    batch["position_ids"].to(device),
                    chosen_RL.to(device),
                    vocabulary=settings.vocabulary,
                )
                writer.add(wanted, *recorder.encode(wanted, answer))
            advance(labels_RL.numel())
        return writer.finish()


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


def _batches(windows: WindowSet) -> Iterator[dict[str, Tensor]]:
    together = max(1, SCORED_TOGETHER // len(windows[0]["labels"]))
    for start in range(0, len(windows), together):
        stop = min(start + together, len(windows))
        yield collate([windows[index] for index in range(start, stop)])


def _tokens(windows: WindowSet) -> int:
    return len(windows) * len(windows[0]["labels"])
