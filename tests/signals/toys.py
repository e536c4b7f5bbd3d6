"""A few windows of random tokens, random logits for them, and stores of their signals."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.signals import LogitsSignal, SampledSignal, SparseSignal
from stillhouse.signals.decode import StoredSignal
from stillhouse.signals.encodings import (
    Encoding,
    EntryEncoding,
    Sampled,
    Stratified,
    Threshold,
    TopK,
    TopP,
)
from stillhouse.signals.manifest import Settings
from stillhouse.signals.record import Recorder
from stillhouse.signals.segments import Segments, find_segments
from stillhouse.signals.writer import StoreWriter

VOCABULARY = 300
IDENTITY = {"teacher": "aaaa", "tokenizer": "bbbb"}
ENTRY_ENCODINGS: list[EntryEncoding] = [
    TopK(6),
    TopK(6, tail=False),
    TopP(0.8, most=20),
    Sampled(20),
    Sampled(20, exponent=0.8),
    Stratified(4, 5),
    Stratified(4, 5, probability_bytes=2),
    Threshold(0.05),
    Threshold(0.05, probability_bytes=2),
]


@dataclass
class Batch:
    """Windows, their segments, and the teacher's logits for each supervised token, [N, V]."""

    input_ids_RL: Tensor
    labels_RL: Tensor
    position_ids_RL: Tensor
    segments: Segments
    logits_NV: Tensor

    def part(self, chosen_S: np.ndarray) -> tuple[Segments, LogitsSignal]:
        rows = torch.from_numpy(self.segments.chosen_rows(chosen_S))
        return self.segments.only(chosen_S), LogitsSignal(self.logits_NV[rows])


def batch(
    windows: int = 6, context: int = 40, vocabulary: int = VOCABULARY, seed: int = 0
) -> Batch:
    """Windows of three segments: the first has some masked labels, and the last is padding."""
    g = torch.Generator().manual_seed(seed)
    ids_RL = torch.randint(0, vocabulary, (windows, context), generator=g)
    first = torch.randint(8, context // 2, (windows,), generator=g)
    positions_RL, labels_RL = torch.zeros_like(ids_RL), ids_RL.clone()
    for r, cut in enumerate(first.tolist()):
        ends = [0, cut, context - 5, context]
        for start, end in pairwise(ends):
            positions_RL[r, start:end] = torch.arange(end - start)
            labels_RL[r, start] = -100
        labels_RL[r, 2:5] = -100
        labels_RL[r, context - 5 :] = -100
    segments = find_segments(ids_RL, labels_RL, positions_RL)
    logits_NV = torch.randn(segments.rows, vocabulary, generator=g) * 3
    return Batch(ids_RL, labels_RL, positions_RL, segments, logits_NV)


def settings(encoding: Encoding, vocabulary: int = VOCABULARY, **changes: Any) -> Settings:
    return Settings(
        **{"encoding": encoding, "vocabulary": vocabulary, "identity": IDENTITY} | changes
    )


def record(path: Path, of: Settings, data: Batch, shards: int = 1, **options: Any) -> None:
    """Writes a finished store of the batch, with its segments distributed over the shards."""
    recorder = Recorder(of)
    with StoreWriter(path, of, **options) as writer:
        for shard in range(shards):
            turn_S = np.arange(len(data.segments)) % shards == shard
            wanted_S = turn_S & writer.missing(data.segments)
            segments, answer = data.part(wanted_S)
            if len(segments):
                writer.add(segments, *recorder.encode(segments, answer))
                writer.flush()
        writer.finish()


def estimate(signal: StoredSignal, vocabulary: int) -> Tensor:
    """The probabilities that a signal stands for, [N, V]; a sparse signal's tail is left out."""
    if isinstance(signal, SparseSignal):
        weights_NK = signal.log_probs_NK.exp()
    else:
        assert isinstance(signal, SampledSignal)
        weights_NK = signal.counts_NK / signal.counts_NK.sum(1, keepdim=True)
    p_NV = torch.zeros(len(weights_NK), vocabulary)
    return p_NV.scatter_add(1, signal.ids_NK.long(), weights_NK)


def tensors(signal: StoredSignal) -> list[Tensor]:
    return [value for value in vars(signal).values() if isinstance(value, Tensor)]


def same(one: StoredSignal, other: StoredSignal) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
