"""The head gradient's matrix product, summed in a wider dtype than it is multiplied in.

Shapes: n rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_BLOCK_ROWS = 4096
"""Vocabulary rows in one low-precision product on a CPU: its result stays in the cache."""


def accumulate_outer_(
    total_VD: Tensor, dlogits_nV: Tensor, hidden_nD: Tensor, factor: float, *, first: bool
) -> None:
    """total += factor · dlogitsᵀ hidden; `first` overwrites what `total` held instead.

    Products in a narrow dtype come out in that dtype on a CPU, so each is rounded once and the
    sum over chunks is taken in the dtype of `total`.
    """
    if total_VD.dtype == dlogits_nV.dtype:
        torch.addmm(
            total_VD,
            dlogits_nV.T,
            hidden_nD,
            beta=0.0 if first else 1.0,
            alpha=factor,
            out=total_VD,
        )
    elif total_VD.is_cuda:
        product_VD = torch.mm(dlogits_nV.T, hidden_nD, out_dtype=total_VD.dtype)
        _add_(total_VD, product_VD, factor, first=first)
    else:
        buffer = dlogits_nV.new_empty(min(HEAD_BLOCK_ROWS, len(total_VD)), hidden_nD.shape[1])
        for start in range(0, len(total_VD), HEAD_BLOCK_ROWS):
            part = total_VD[start : start + HEAD_BLOCK_ROWS]
            columns = dlogits_nV[:, start : start + HEAD_BLOCK_ROWS]
            product = torch.mm(columns.T, hidden_nD, out=buffer[: len(part)])
            _add_(part, product, factor, first=first)


def accumulate_columns_(
    total_V: Tensor, dlogits_nV: Tensor, weights_n1: Tensor, factor: float
) -> None:
    """total += factor · Σ_n weight · dlogits, in the dtype of `total`."""
    for start in range(0, len(total_V), HEAD_BLOCK_ROWS):
        part = slice(start, start + HEAD_BLOCK_ROWS)
        columns_nP = dlogits_nV[:, part].to(total_V.dtype)
        total_V[part].add_((columns_nP.T @ weights_n1)[:, 0], alpha=factor)


def _add_(total: Tensor, product: Tensor, factor: float, *, first: bool) -> None:
    if first:
        total.copy_(product)
        if factor != 1.0:
            total.mul_(factor)
    else:
        total.add_(product, alpha=factor)
