"""Types of signals from a teacher.

Shapes: N supervised rows, P of these inside chunks, C chunks, K entries of a row, D hidden width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LMHead:
    """The head of a language model: logits = softcap(scale · (h Wᵀ + b)).

    A `softcap` of c maps z to c·tanh(z / c) (Gemma 2), after `scale` is applied (Cohere, Granite).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def to(self, device: torch.device) -> LMHead:
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return LMHead(self.weight_VD.to(device), bias_V, self.scale, self.softcap)

    def apart(self) -> LMHead:
        """Copy a head on the CPU, since views of a mapped checkpoint keep all of its pages in
        memory."""
        if self.weight_VD.device.type != "cpu":
            return self
        bias_V = None if self.bias_V is None else self.bias_V.detach().clone()
        return replace(self, weight_VD=self.weight_VD.detach().clone(), bias_V=bias_V)


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's full distribution, as hidden states and the head that maps them to logits.

    Row n predicts the same token as the student's row n. The logits of all rows are never in
    memory at once.
    """

    hidden_ND: Tensor
    head: LMHead


@dataclass(frozen=True)
class LogitsSignal:
    """The teacher's full distribution, as logits before any temperature.

    −inf marks an impossible token. Columns beyond the student's vocabulary are left out of the
    softmax.
    """

    logits_NV: Tensor


@dataclass(frozen=True)
class SparseSignal:
    """The teacher's top tokens, and the probability of all others together.

    ids_NK: K distinct tokens per row. A shorter row is padded with its first id and a
        log-probability of -inf.
    log_probs_NK: their log-probabilities in the full distribution, not renormalized over K.
    tail_N: the mass of all other tokens, in [0, 1].
    temperature: of the softmax. A tail cannot be converted to a different temperature.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_N: Tensor
    temperature: float = 1.0


@dataclass(frozen=True)
class SampledSignal:
    """Tokens drawn from the teacher's distribution with replacement, and their counts.

    ids_NK: the drawn tokens. A shorter row is padded with any id and a count of 0.
    counts_NK: how often each was drawn, or any nonnegative importance weight. A row's counts
        divided by their sum estimate the teacher's probabilities.
    temperature: of the softmax that they were drawn from.
    """

    ids_NK: Tensor
    counts_NK: Tensor
    temperature: float = 1.0


@dataclass(frozen=True)
class FrozenHeadSignal:
    """All that forward KL needs from the teacher if the student's head W [V, D] is frozen.

    KL(p ‖ softmax(W h / T)) = Σ p log p − (Wᵀp)·h / T + logsumexp(W h / T), where W includes the
    head's scale.

    vector_ND: Wᵀp. negative_entropy_N: Σ p log p, in nats. temperature: T, of the softmax p.
    """

    vector_ND: Tensor
    negative_entropy_N: Tensor
    temperature: float = 1.0


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's hidden states [N, D] after chosen layers, by layer index."""

    hidden_ND: Mapping[int, Tensor]


@dataclass(frozen=True)
class Fold:
    """The events that two vocabularies share, called roots, and the root of each token.

    A root's probability under a model is the sum over the tokens that map to it, so both models'
    probabilities of the roots sum to 1. Every root has tokens of both vocabularies, since an event
    that one model cannot produce would have an infinite divergence.

    student_V, teacher_W: the root of each token id, int64, in [0, roots).
    """

    student_V: Tensor
    teacher_W: Tensor
    roots: int

    def to(self, device: torch.device) -> Fold:
        return Fold(self.student_V.to(device), self.teacher_W.to(device), self.roots)


@dataclass(frozen=True)
class ChunkSignal:
    """A teacher's log-likelihoods of chunks.

    A chunk is the text between neighboring places where the teacher's and the student's tokenizers
    both begin a token.

    rows_P: the student's supervised rows that predict the chunks' tokens.
    chunk_P: the chunk that each of these rows belongs to, in [0, C).
    log_probs_C: log p of each chunk's text, given the text before it, summed over the teacher's
        tokens.
    """

    rows_P: Tensor
    chunk_P: Tensor
    log_probs_C: Tensor


@dataclass(frozen=True)
class FoldedSignal:
    """The distribution of a teacher with a different tokenizer, compared over shared roots.

    signal: dense, over the teacher's own vocabulary, or sparse or sampled, with roots as ids. Its
        rows correspond to the student's.
    covered_N: rows where the teacher's text has a token boundary too. The others get no loss from
        the teacher, regardless of their values in `signal` (which must be finite).
    chunks: for `chunk_loss`; None if unknown.
    """

    signal: DenseSignal | SparseSignal | SampledSignal
    fold: Fold
    covered_N: Tensor
    chunks: ChunkSignal | None = None


Signal = DenseSignal | LogitsSignal | SparseSignal | SampledSignal | FrozenHeadSignal | FoldedSignal
"""Any signal that a student's output can be compared with."""

S = TypeVar("S", bound="Signal | ChunkSignal")


def inner_signal(signal: Signal | ChunkSignal | None) -> Signal | ChunkSignal | None:
    """The signal itself, or the one inside a FoldedSignal."""
    return signal.signal if isinstance(signal, FoldedSignal) else signal


def moved_rows(signal: S, device: torch.device, *, non_blocking: bool = False) -> S:
    """Move the signal's rows to the device. Heads and folds stay where they are."""
    moved: dict[str, Any] = {}
    for name, value in ((each.name, getattr(signal, each.name)) for each in fields(signal)):
        if isinstance(value, Tensor):
            moved[name] = value.to(device, non_blocking=non_blocking)
        elif isinstance(value, Signal | ChunkSignal):
            moved[name] = moved_rows(value, device, non_blocking=non_blocking)
    return replace(signal, **moved)
