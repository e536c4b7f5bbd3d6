"""What can be wrong with a loss's inputs, said before any product is computed.

Values are looked at on the CPU only: on an accelerator that would stall the queue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import SignalError
from stillhouse.objectives.terms import Term
from stillhouse.signals import DenseSignal, LMHead


def check_inputs(
    hidden_ND: Tensor,
    head: LMHead,
    terms: Sequence[Term],
    signal: DenseSignal | None,
    targets_N: Tensor | None,
    row_weights_N: Tensor | None,
    vocab_size: int | None,
) -> int:
    """Checks shapes and, on a CPU, values; gives the number of shared vocabulary rows."""
    if not terms:
        raise SignalError("the loss has no terms", fix="give at least one Term")
    check_rows("hidden_ND", hidden_ND, head)
    rows = hidden_ND.shape[0]
    vocab = head.weight_VD.shape[0]
    needs_teacher = [t.divergence for t in terms if t.divergence != "cross_entropy"]
    if needs_teacher and signal is None:
        raise SignalError(
            f"{needs_teacher[0]} compares with a teacher, and there is no signal",
            fix="pass signal=DenseSignal(teacher_hidden, teacher_head)",
        )
    if signal is not None:
        check_rows("signal.hidden_ND", signal.hidden_ND, signal.head)
        same_rows("signal.hidden_ND", signal.hidden_ND, rows)
        vocab = min(vocab, signal.head.weight_VD.shape[0])
    vocab = _vocabulary(vocab, vocab_size)
    if any(term.divergence == "cross_entropy" for term in terms):
        _check_targets(targets_N, rows, vocab)
    if row_weights_N is not None:
        _check_row_weights(row_weights_N, rows)
    return vocab


def check_rows(name: str, hidden_ND: Tensor, head: LMHead) -> None:
    """Two dimensions, the head's width, and no NaN or infinity."""
    if hidden_ND.ndim != 2:
        raise SignalError(
            f"{name} has shape {tuple(hidden_ND.shape)}; it must be [rows, width]",
            fix="flatten batch and position, and keep supervised rows only",
        )
    if hidden_ND.shape[1] != head.weight_VD.shape[1]:
        raise SignalError(
            f"{name} is {hidden_ND.shape[1]} wide and its head expects {head.weight_VD.shape[1]}",
            fix="pass each model's hidden rows with that model's own head",
        )
    bias = head.bias_V
    if bias is not None and bias.shape != head.weight_VD.shape[:1]:
        raise SignalError(
            f"the bias of {name}'s head has shape {tuple(bias.shape)} and its weight has "
            f"{head.weight_VD.shape[0]} rows"
        )
    check_finite(name, hidden_ND)


def same_rows(name: str, tensor: Tensor, rows: int) -> None:
    if tensor.shape[0] != rows:
        raise SignalError(
            f"{name} has {tensor.shape[0]} rows and hidden_ND has {rows}",
            fix="row n of every tensor must predict the same token",
        )


def check_finite(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or math.isfinite(
        float(tensor.detach().sum(dtype=torch.float64))
    ):
        return
    bad = (~torch.isfinite(tensor.detach().flatten(1))).any(1) if tensor.ndim > 1 else None
    bad_rows = bad if bad is not None else ~torch.isfinite(tensor.detach())
    if bad_rows.any():
        row = int(bad_rows.nonzero()[0])
        raise SignalError(
            f"{name} is not finite in row {row} ({int(bad_rows.sum())} such rows)",
            fix="look at the model that made it: an overflow in float16, or a diverged step",
        )


def _vocabulary(shared: int, asked: int | None) -> int:
    if asked is None:
        return shared
    if not 0 < asked <= shared:
        raise SignalError(
            f"vocab_size is {asked} and the heads share {shared} rows",
            fix="vocab_size is the number of real tokens in both vocabularies",
        )
    return asked


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


def check_ids(name: str, ids: Tensor, vocab: int) -> None:
    """Every id in [0, vocab); looked at on a CPU only."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) >= 0 and int(high) < vocab:
        return
    wrong = ((ids < 0) | (ids >= vocab)).reshape(ids.shape[0], -1)
    row = int(wrong.any(1).nonzero()[0])
    value = int(ids.reshape(ids.shape[0], -1)[row][wrong[row]][0])
    raise SignalError(
        f"{name} holds the id {value} in row {row}; the vocabulary has {vocab} tokens",
        fix="keep supervised rows only (no -100), and use one tokenizer for both models",
    )


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
