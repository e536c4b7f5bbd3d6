"""Checks of a loss's inputs, before any product is computed.

Values are only checked on a CPU: on an accelerator, reading them would stall the queue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives.terms import Term
from stillhouse.signals import (
    DenseSignal,
    FoldedSignal,
    FrozenHeadSignal,
    LMHead,
    LogitsSignal,
    SampledSignal,
    Signal,
    SparseSignal,
)

MASS_TOLERANCE = 0.05
"""How far the sum of a sparse row's probabilities and tail can be from 1 (bfloat16 storage)."""


def check_inputs(
    hidden_ND: Tensor,
    head: LMHead,
    terms: Sequence[Term],
    signal: Signal | None,
    targets_N: Tensor | None,
    row_weights_N: Tensor | None,
    vocab_size: int | None,
) -> int:
    """Check shapes and, on a CPU, values; return the number of shared vocabulary rows."""
    if not terms:
        raise SignalError("the loss has no terms", fix="pass at least one Term")
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
    if signal is not None:
        _check_signal(signal, head, rows, vocab)
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
                f"{name} is sharded across processes",
                fix="under FSDP2, compute the loss inside the wrapped module's forward, where the "
                "head is unsharded; vocabulary-parallel heads are not supported",
            )


def _vocabulary(shared: int, requested: int | None) -> int:
    if requested is None:
        return shared
    if not 0 < requested <= shared:
        raise SignalError(
            f"vocab_size is {requested}, but it must be between 1 and {shared}, the number of "
            "rows that both heads have",
            fix="set vocab_size to the number of real tokens in both vocabularies",
        )
    return requested


def _check_targets(targets_N: Tensor | None, rows: int, vocab: int) -> None:
    if targets_N is None:
        raise SignalError(
            "cross_entropy needs the data's own tokens", fix="pass targets_N, one id per row"
        )
    if targets_N.ndim != 1 or targets_N.is_floating_point():
        raise SignalError(
            f"targets_N has dtype {targets_N.dtype} and shape {tuple(targets_N.shape)}; "
            "expected one integer per row"
        )
    same_rows("targets_N", targets_N, rows)
    check_ids("targets_N", targets_N, vocab)


def _check_row_weights(row_weights_N: Tensor, rows: int) -> None:
    _require_dimensions("row_weights_N", row_weights_N, "rows")
    same_rows("row_weights_N", row_weights_N, rows)
    check_finite("row_weights_N", row_weights_N)
    if row_weights_N.device.type == "cpu" and rows and float(row_weights_N.min()) < 0:
        row = int((row_weights_N < 0).nonzero()[0])
        raise SignalError(
            f"row_weights_N is negative in row {row}: {float(row_weights_N[row])}",
            fix="use row weights of zero or more",
        )


def check_terms_fit(terms: Sequence[Term], signal: Signal | None) -> None:
    """Raise SignalError if a term's divergence cannot be computed from this signal."""
    for term in terms:
        if not term.needs_teacher:
            continue
        if isinstance(signal, FoldedSignal):
            check_terms_fit([term], signal.signal)
            continue
        name = term.divergence
        if signal is None:
            raise SignalError(
                f"{name} compares the student with a teacher, but there is no signal",
                fix="pass signal=DenseSignal(teacher_hidden, teacher_head), or a stored signal",
            )
        if isinstance(signal, SampledSignal) and name != "forward_kl":
            raise SignalError(
                f"{name} is not defined on a sampled signal: it is not linear in the teacher's "
                "probabilities, so unbiased samples would lead to a biased gradient",
                fix="use forward_kl, or a dense or sparse signal",
            )
        if isinstance(signal, FrozenHeadSignal) and name != "forward_kl":
            raise SignalError(
                f"{name} cannot be computed from a frozen-head signal, which contains only what "
                "forward_kl needs",
                fix="use forward_kl, or a dense or sparse signal",
            )
        if isinstance(signal, SparseSignal) and name == "adaptive_kl":
            raise SignalError(
                "adaptive_kl is not defined on a sparse signal: it sorts tokens by probability, "
                "but the tail lumps many tokens together",
                fix="use a dense signal, or a different divergence",
            )
        if (
            isinstance(signal, SparseSignal | SampledSignal | FrozenHeadSignal)
            and term.temperature != signal.temperature
        ):
            raise SignalError(
                f"{name} has temperature {term.temperature:g}, but the signal was recorded "
                f"at {signal.temperature:g}: {_FIXED[type(signal)]} cannot be converted to a "
                "different temperature",
                fix=f"use temperature {signal.temperature:g}, or record the signal again",
            )


_FIXED = {SparseSignal: "its tail", SampledSignal: "a sample", FrozenHeadSignal: "its vector"}
"""What cannot be converted to a different temperature."""


def _check_signal(signal: Signal, head: LMHead, rows: int, vocab: int) -> None:
    match signal:
        case DenseSignal():
            check_rows("signal.hidden_ND", signal.hidden_ND, signal.head)
            same_rows("signal.hidden_ND", signal.hidden_ND, rows)
        case LogitsSignal():
            _check_logits(signal.logits_NV, rows)
        case SparseSignal():
            _check_sparse(signal, rows, vocab)
        case SampledSignal():
            _check_sampled(signal, rows, vocab)
        case FrozenHeadSignal():
            _check_frozen(signal, head, rows)
        case FoldedSignal():
            _check_folded(signal, head, rows, vocab)


def check_rows(name: str, hidden_ND: Tensor, head: LMHead) -> None:
    """Require two dimensions, the head's width, and finite values."""
    fix = "flatten batch and position, and keep only supervised rows"
    _require_dimensions(name, hidden_ND, "rows, width", fix)
    if hidden_ND.shape[1] != head.weight_VD.shape[1]:
        raise SignalError(
            f"{name} has width {hidden_ND.shape[1]}, but its head expects "
            f"{head.weight_VD.shape[1]}",
            fix="pass each model's hidden rows with that model's own head",
        )
    bias = head.bias_V
    if bias is not None and bias.shape != head.weight_VD.shape[:1]:
        raise SignalError(
            f"the bias of {name}'s head has shape {tuple(bias.shape)}, but its weight has "
            f"{head.weight_VD.shape[0]} rows"
        )
    check_finite(name, hidden_ND)


def _require_dimensions(name: str, tensor: Tensor, expected: str, fix: str | None = None) -> None:
    if tensor.ndim != len(expected.split(",")):
        raise SignalError(f"{name} has shape {tuple(tensor.shape)}; expected [{expected}]", fix=fix)


def same_rows(name: str, tensor: Tensor, rows: int) -> None:
    if tensor.shape[0] != rows:
        raise SignalError(
            f"{name} has {tensor.shape[0]} rows, but hidden_ND has {rows}",
            fix="align the tensors so that row n of each is about the same token",
        )


def check_finite(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or math.isfinite(
        float(tensor.detach().sum(dtype=torch.float64))
    ):
        return
    _reject(
        (~torch.isfinite(tensor.detach())).reshape(len(tensor), -1).any(1),
        f"{name} is not finite",
        fix="check the model that computed it for overflow in float16 or divergence",
    )


def _check_logits(logits_NV: Tensor, rows: int) -> None:
    name = "signal.logits_NV"
    _require_dimensions(name, logits_NV, "rows, tokens")
    same_rows(name, logits_NV, rows)
    if logits_NV.device.type == "cpu" and rows:
        _reject(~torch.isfinite(logits_NV.amax(1)), f"{name} contains NaN, +inf, or only −inf")


def _check_sparse(signal: SparseSignal, rows: int, vocab: int) -> None:
    ids_NK, log_probs_NK, tail_N = signal.ids_NK, signal.log_probs_NK, signal.tail_N
    _check_entries(ids_NK, log_probs_NK, "signal.log_probs_NK", rows, vocab)
    same_rows("signal.tail_N", tail_N, rows)
    _require_dimensions("signal.tail_N", tail_N, "rows")
    if ids_NK.device.type != "cpu" or not rows:
        return
    ordered_NK, order_NK = ids_NK.sort(stable=True, dim=1)
    # A short row is padded with copies of its first token at -inf.
    twice_NK = (ordered_NK[:, 1:] == ordered_NK[:, :-1]) & (
        log_probs_NK.gather(1, order_NK)[:, 1:].isfinite() | (ordered_NK[:, 1:] != ids_NK[:, :1])
    )
    _reject(twice_NK.any(1), "signal.ids_NK contains a token twice")
    _reject((~(log_probs_NK <= 0)).any(1), "signal.log_probs_NK is positive or NaN")
    _reject(~((tail_N >= 0) & (tail_N <= 1)), "signal.tail_N is not a probability")
    mass_N = log_probs_NK.double().exp().sum(1) + tail_N.double()
    _reject(
        (mass_N - 1.0).abs() > MASS_TOLERANCE,
        "signal.log_probs_NK and signal.tail_N do not sum to 1",
        fix="pass log-probabilities of the full softmax, not renormalized, and the mass of all "
        "other tokens as tail_N",
    )


def _check_frozen(signal: FrozenHeadSignal, head: LMHead, rows: int) -> None:
    """Require a frozen linear head: the stored vectors were computed for one."""
    if head.bias_V is not None or head.softcap is not None:
        raise SignalError(
            "a frozen-head signal requires a head without bias and without a soft cap",
            fix="use a different kind of signal for this student",
        )
    if torch.is_grad_enabled() and head.weight_VD.requires_grad:
        raise SignalError(
            "the signal is for a frozen head, but this head is being trained",
            fix="call head.weight.requires_grad_(False), which also freezes embeddings tied to it",
        )
    if signal.vector_ND.shape[-1] != head.weight_VD.shape[1]:
        raise SignalError(
            f"signal.vector_ND has width {signal.vector_ND.shape[-1]}, but the head expects "
            f"{head.weight_VD.shape[1]}",
            fix="record the signal with this student's head",
        )
    same_rows("signal.vector_ND", signal.vector_ND, rows)
    same_rows("signal.negative_entropy_N", signal.negative_entropy_N, rows)
    check_finite("signal.vector_ND", signal.vector_ND)
    check_finite("signal.negative_entropy_N", signal.negative_entropy_N)


def _check_folded(signal: FoldedSignal, head: LMHead, rows: int, vocab: int) -> None:
    fold, inner = signal.fold, signal.signal
    if fold.student_V.shape != (vocab,):
        raise SignalError(
            f"signal.fold.student_V has shape {tuple(fold.student_V.shape)}, but the student "
            f"has {vocab} tokens",
            fix="pass one root for each of the student's tokens",
        )
    check_ids("signal.fold.student_V", fold.student_V, fold.roots)
    check_ids("signal.fold.teacher_W", fold.teacher_W, fold.roots)
    if isinstance(inner, DenseSignal) and len(inner.head.weight_VD) < len(fold.teacher_W):
        raise SignalError(
            f"signal.fold.teacher_W has {len(fold.teacher_W)} tokens, but the teacher's head "
            f"has only {len(inner.head.weight_VD)} rows",
            fix="pass one root for each row of the teacher's head that is a token",
        )
    same_rows("signal.covered_N", signal.covered_N, rows)
    _check_signal(inner, head, rows, fold.roots)


def _check_sampled(signal: SampledSignal, rows: int, vocab: int) -> None:
    counts_NK = signal.counts_NK
    _check_entries(signal.ids_NK, counts_NK, "signal.counts_NK", rows, vocab)
    if counts_NK.device.type != "cpu" or not rows:
        return
    _reject((~(counts_NK >= 0)).any(1), "signal.counts_NK is negative or NaN")
    total_N = counts_NK.double().sum(1)
    _reject(
        ~((total_N > 0) & torch.isfinite(total_N)),
        "signal.counts_NK does not have a positive, finite sum",
    )


def _check_entries(ids_NK: Tensor, values_NK: Tensor, name: str, rows: int, vocab: int) -> None:
    if ids_NK.ndim != 2 or ids_NK.is_floating_point() or ids_NK.shape[1] == 0:
        raise SignalError(
            f"signal.ids_NK has dtype {ids_NK.dtype} and shape {tuple(ids_NK.shape)}; "
            "expected at least one integer per row"
        )
    if values_NK.shape != ids_NK.shape:
        raise SignalError(
            f"{name} has shape {tuple(values_NK.shape)}, but signal.ids_NK has "
            f"{tuple(ids_NK.shape)}",
            fix="pass one value for each id",
        )
    same_rows("signal.ids_NK", ids_NK, rows)
    if ids_NK.shape[1] > vocab and name == "signal.log_probs_NK":
        raise SignalError(
            f"signal.ids_NK has {ids_NK.shape[1]} tokens per row, but the vocabulary has only "
            f"{vocab}"
        )
    check_ids("signal.ids_NK", ids_NK, vocab)


def _reject(wrong_N: Tensor, what: str, fix: str | None = None) -> None:
    if bool(wrong_N.any()):
        rows = wrong_N.nonzero()[:, 0]
        more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        raise SignalError(f"{what} in row {int(rows[0])}{more}", fix=fix)


def check_ids(name: str, ids: Tensor, vocab: int) -> None:
    """Require every id to be in [0, vocab); only checked on a CPU."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) >= 0 and int(high) < vocab:
        return
    place = ((ids < 0) | (ids >= vocab)).nonzero()[0].tolist()
    raise SignalError(
        f"{name} contains the id {int(ids[tuple(place)])} in row {place[0]}, but ids must be "
        f"between 0 and {vocab - 1}",
        fix="keep only supervised rows (no -100), and use the same tokenizer for both models",
    )
