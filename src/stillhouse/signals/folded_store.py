"""Stored signals of a teacher with a different tokenizer, which are distributions over roots.

A row is a distribution over the roots and one more event, "not covered", which has probability 1
where no token of the teacher begins with the student's. Rows of every encoding thus take as many
bytes as those of any other teacher. FOLD in the store's folder contains the root of each of the
student's tokens.

Shapes: N rows, n rows of a chunk, K entries of a row, R roots, V student tokens.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.disk_errors import disk_errors
from stillhouse.errors import SignalError, StoreError
from stillhouse.signals.lm_head import head_logits
from stillhouse.signals.manifest import Settings
from stillhouse.signals.signal_types import (
    DenseSignal,
    Fold,
    FoldedSignal,
    SampledSignal,
    SparseSignal,
)

FOLD = "fold.safetensors"
ROOTS = "roots"
"""The fold's key in a store's identity."""
IMPOSSIBLE = -1e4


def fold_sha256(fold: Fold) -> str:
    """SHA-256 of the roots of the student's tokens."""
    content = fold.student_V.to(torch.int32).cpu().numpy().astype("<i4").tobytes()
    return hashlib.sha256(content + fold.roots.to_bytes(4, "little")).hexdigest()


def write_fold(fold: Fold, path: Path) -> None:
    """Write FOLD to a store's folder. Raises RunError if it cannot be written."""
    content = {"student": fold.student_V.to(torch.int32).cpu().contiguous()}
    with disk_errors(path):
        save_file(content, path / FOLD, metadata={"roots": str(fold.roots)})


def read_fold(path: Path, settings: Settings) -> Fold | None:
    """Read the fold of a store; None if its rows are distributions over tokens.

    The teacher's side of the fold is empty. Raises StoreError if the file is missing, damaged, or
    from a different store.
    """
    if ROOTS not in settings.identity:
        return None
    try:
        with safe_open(path / FOLD, framework="pt") as file:
            student_V = file.get_tensor("student").long()
            fold = Fold(student_V, student_V.new_empty(0), int(file.metadata()["roots"]))
    except (OSError, SafetensorError, LookupError, ValueError, TypeError) as error:
        raise StoreError(
            f"the roots of the student's tokens cannot be read ({error})",
            where=path / FOLD,
            fix="copy the file again, or record the store again",
        ) from error
    if fold_sha256(fold) != settings.identity[ROOTS]:
        raise StoreError(
            "the roots of the student's tokens belong to a different store",
            where=path / FOLD,
            fix="copy the store again, or record it again",
        )
    return fold


def event_logits(signal: FoldedSignal, rows: slice, temperature: float) -> Tensor:
    """Logits, float32 [n, R + 1], whose softmax at the temperature is the teacher's distribution
    over the roots and "not covered"."""
    dense, fold = signal.signal, signal.fold
    if not isinstance(dense, DenseSignal):
        raise SignalError(
            f"a {type(dense).__name__} over roots cannot be recorded",
            fix="record the teacher itself",
        )
    logits_nW = head_logits(dense.head, dense.hidden_ND[rows])[:, : len(fold.teacher_W)].float()
    probability_nW = (logits_nW / temperature).softmax(-1)
    sums_nR = probability_nW.new_zeros(len(logits_nW), fold.roots)
    sums_nR.index_add_(1, fold.teacher_W, probability_nW)
    events_nR = sums_nR.log().clamp_(min=IMPOSSIBLE) * temperature
    found_nE = torch.cat([events_nR, torch.full_like(events_nR[:, :1], IMPOSSIBLE)], 1)
    uncovered_n = ~signal.covered_N[rows]
    found_nE[uncovered_n] = IMPOSSIBLE
    found_nE[uncovered_n, -1] = 0.0
    return found_nE


def unfolded_rows(signal: SparseSignal | SampledSignal, fold: Fold) -> FoldedSignal:
    """Convert stored rows over the roots and "not covered" to a signal."""
    ids_NK = signal.ids_NK.long()
    uncovered_NK = ids_NK == fold.roots
    covered_N = ~uncovered_NK[:, 0]
    inner: SparseSignal | SampledSignal
    if isinstance(signal, SampledSignal):
        counts_NK = signal.counts_NK.masked_fill(uncovered_NK, 0.0)
        counts_NK[~covered_N] = 1.0
        ids_NK = ids_NK.masked_fill(uncovered_NK, 0)
        inner = replace(signal, ids_NK=ids_NK, counts_NK=counts_NK)
    else:
        # In a covered row, "not covered" can only be padding: replace it with the row's first id.
        ids_NK = torch.where(uncovered_NK, ids_NK[:, :1], ids_NK)
        log_p_NK = signal.log_probs_NK.masked_fill(uncovered_NK, -torch.inf)
        ids_NK[~covered_N] = 0  # an arbitrary distribution, since these rows have no loss
        log_p_NK[~covered_N] = -torch.inf
        log_p_NK[~covered_N, 0] = math.log(0.5)
        tail_N = signal.tail_N.masked_fill(~covered_N, 0.5)
        inner = replace(signal, ids_NK=ids_NK, log_probs_NK=log_p_NK, tail_N=tail_N)
    return FoldedSignal(inner, fold, covered_N)
