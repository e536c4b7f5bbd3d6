"""Checks of a loss's inputs, before any product is computed.

Values are checked on the CPU only: on an accelerator that would stall the queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives.signal_checks import (
    check_finite,
    check_ids,
    check_rows,
    check_signal,
    check_terms_fit,
    same_rows,
)
from stillhouse.objectives.terms import Term
from stillhouse.signals import (
    DenseSignal,
    FoldedSignal,
    FrozenHeadSignal,
    LMHead,
    LogitsSignal,
    Signal,
)


def check_inputs(
    hidden_ND: Tensor,
    head: LMHead,
    terms: Sequence[Term],
    signal: Signal | None,
    targets_N: Tensor | None,
    row_weights_N: Tensor | None,
    vocab_size: int | None,
) -> int:
    """Check shapes and, on a CPU, values; returns the number of shared vocabulary rows."""
    if not terms:
        raise SignalError("the loss has no terms", fix="give at least one Term")
    _reject_sharded(hidden_ND, head, signal)
    check_rows("hidden_ND", hidden_ND, head)
    rows = len(hidden_ND)
    shared = len(head.weight_VD)
    if isinstance(signal, DenseSignal):
        shared = min(shared, len(signal.head.weight_VD))
    elif isinstance(signal, LogitsSignal) and signal.logits_NV.ndim == 2:
        shared = min(shared, signal.logits_NV.shape[1])
    elif isinstance(signal, FoldedSignal) and vocab_size is None:
        vocab_size = len(signal.fold.student_V)
    vocab = _vocabulary(shared, vocab_size)
    check_terms_fit(terms, signal)
    if isinstance(signal, FrozenHeadSignal):
        _check_frozen_head(head, signal)
    if signal is not None:
        check_signal(signal, rows, vocab)
    if any(not term.needs_teacher for term in terms):
        _check_targets(targets_N, rows, vocab)
    if row_weights_N is not None:
        _check_row_weights(row_weights_N, rows)
    return vocab


def _reject_sharded(hidden_ND: Tensor, head: LMHead, signal: Signal | None) -> None:
    """Reject a sharded head: its softmax would cover only part of the vocabulary."""
    named = {"hidden_ND": hidden_ND, "head.weight_VD": head.weight_VD}
    if isinstance(signal, DenseSignal):
        named["signal.head.weight_VD"] = signal.head.weight_VD
    for name, tensor in named.items():
        if hasattr(tensor, "full_tensor"):
            raise SignalError(
                f"{name} is sharded over processes",
                fix="under FSDP2, compute the loss inside the wrapped module's forward, where the "
                "head is unsharded; vocabulary-parallel heads are not supported",
            )


def _vocabulary(shared: int, requested: int | None) -> int:
    if requested is None:
        return shared
    if not 0 < requested <= shared:
        raise SignalError(
            f"vocab_size is {requested} and the heads share {shared} rows",
            fix="vocab_size is the number of real tokens in both vocabularies",
        )
    return requested


def _check_frozen_head(head: LMHead, signal: FrozenHeadSignal) -> None:
    """Require a frozen linear head: the stored vectors were computed for one."""
    if head.bias_V is not None or head.softcap is not None:
        raise SignalError(
            "a frozen-head signal is for a head without bias and without a cap on its logits",
            fix="use another kind of signal for this student",
        )
    if torch.is_grad_enabled() and head.weight_VD.requires_grad:
        raise SignalError(
            "the signal is for a frozen head, and this head is trained",
            fix="head.weight.requires_grad_(False), which freezes embeddings tied to it too",
        )
    if signal.vector_ND.shape[-1] != head.weight_VD.shape[1]:
        raise SignalError(
            f"signal.vector_ND is {signal.vector_ND.shape[-1]} wide, and the head "
            f"{head.weight_VD.shape[1]}",
            fix="record the signal with this student's head",
        )


def _check_targets(targets_N: Tensor | None, rows: int, vocab: int) -> None:
    if targets_N is None:
        raise SignalError(
            "cross_entropy needs the data's own tokens", fix="pass targets_N, one id a row"
        )
    if targets_N.ndim != 1 or targets_N.is_floating_point():
        raise SignalError(
            f"targets_N is {targets_N.dtype} of shape {tuple(targets_N.shape)}; "
            "it must hold one integer a row"
        )
    same_rows("targets_N", targets_N, rows)
    check_ids("targets_N", targets_N, vocab)


def _check_row_weights(row_weights_N: Tensor, rows: int) -> None:
    if row_weights_N.ndim != 1:
        raise SignalError(f"row_weights_N has shape {tuple(row_weights_N.shape)}; it must be [N]")
    same_rows("row_weights_N", row_weights_N, rows)
    check_finite("row_weights_N", row_weights_N)
    if row_weights_N.device.type == "cpu" and rows and float(row_weights_N.min()) < 0:
        row = int((row_weights_N < 0).nonzero()[0])
        raise SignalError(
            f"row_weights_N is negative in row {row}: {float(row_weights_N[row])}",
            fix="weights of rows are zero or more",
        )
