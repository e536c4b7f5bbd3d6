"""Matrix products with the LM head: its logits, and its gradient, summed in a wider dtype.

Shapes: n rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.cpu_products import is_fast, product
from stillhouse.signals import LMHead

HEAD_BLOCK_ROWS = 4096
"""Vocabulary rows per low-precision product on a CPU, so that its result stays in the cache."""
HEAD_BLOCK_ROWS_CUDA = 1 << 15
"""The same on a GPU, to bound memory where torch cannot add a product to a wider sum."""
TILE_ELEMENTS = 1 << 18
"""Logits that oneDNN computes at a time, few enough to be in the cache when they are copied."""


@dataclass(frozen=True)
class ComputeHead:
    """An LM head, trimmed to V rows and cast once to the compute dtype."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, head: LMHead, vocab_size: int, dtype: torch.dtype) -> ComputeHead:
        bias = head.bias_V
        return cls(
            head.weight_VD.detach()[:vocab_size].to(dtype),
            None if bias is None else bias.detach()[:vocab_size],
            float(head.scale),
            None if head.softcap is None else float(head.softcap),
        )

    def raw_logits(self, hidden_nD: Tensor, out_nV: Tensor) -> None:
        """Write h Wᵀ in the compute dtype; `finish_` applies bias, scale, and soft cap."""
        product_(out_nV, hidden_nD, self.weight_VD)

    def finish_(self, logits_nV: Tensor) -> None:
        """Turn raw logits into the model's logits, in place, in the reduction dtype."""
        if self.bias_V is not None:
            logits_nV.add_(self.bias_V)
        if self.scale != 1.0:
            logits_nV.mul_(self.scale)
        if self.softcap is not None:
            logits_nV.div_(self.softcap).tanh_().mul_(self.softcap)


def product_(out_nX: Tensor, a_nK: Tensor, b_XK: Tensor) -> None:
    """Write a bᵀ into `out`. b: the head's rows, or its columns as a transposed view."""
    if not is_fast(a_nK, b_XK):
        torch.mm(a_nK, b_XK.T, out=out_nX)
        return
    # Logits of a tile are still in the cache when they are copied.
    tile = max(1, TILE_ELEMENTS // len(out_nX))
    for start in range(0, len(b_XK), tile):
        part = slice(start, start + tile)
        out_nX[:, part] = product(a_nK, b_XK[part])


def accumulate_outer_(
    total_VD: Tensor, dlogits_nV: Tensor, hidden_nD: Tensor, factor: float, *, first: bool
) -> None:
    """Add factor · dlogitsᵀ hidden to `total`; with `first`, overwrite it.

    MKL, and a GPU that adds to a wider `total`, do the addition inside the matrix multiplication.
    oneDNN returns products in their own dtype: if it is narrow, each product is rounded once, and
    the sum over chunks is in the dtype of `total`.
    """
    same = total_VD.dtype == dlogits_nV.dtype
    fast = same and is_fast(dlogits_nV, hidden_nD)
    if (same and not fast) or adds_products_wide(total_VD.device.type):
        torch.addmm(
            total_VD,
            dlogits_nV.T,
            hidden_nD,
            beta=0.0 if first else 1.0,
            alpha=factor,
            out=total_VD,
            **({} if same else {"out_dtype": total_VD.dtype}),
        )
        return
    rows = HEAD_BLOCK_ROWS_CUDA if total_VD.is_cuda else HEAD_BLOCK_ROWS
    for start in range(0, len(total_VD), rows):
        part = slice(start, start + rows)
        columns_Pn = dlogits_nV[:, part].T
        wide: dict[str, Any] = {"out_dtype": total_VD.dtype} if total_VD.is_cuda else {}
        if fast:
            product_PD = product(columns_Pn, hidden_nD.T)
        else:
            product_PD = torch.mm(columns_Pn, hidden_nD, **wide)
        if not first:
            total_VD[part].add_(product_PD, alpha=factor)
            continue
        total_VD[part].copy_(product_PD)
        if factor != 1.0:
            total_VD[part].mul_(factor)


def adds_products_wide(device: str) -> bool:
    """Whether `torch.addmm` can add products of 16-bit matrices to a float32 matrix: on GPUs since
    torch 2.10 (https://github.com/pytorch/pytorch/pull/167931)."""
    return device == "cuda" and torch.__version__ >= "2.10"


def accumulate_columns_(
    total_V: Tensor, dlogits_nV: Tensor, weights_n1: Tensor, factor: float
) -> None:
    """Add factor · Σ_n weight · dlogits to `total`, computed in the dtype of `total`."""
    for start in range(0, len(total_V), HEAD_BLOCK_ROWS):
        part = slice(start, start + HEAD_BLOCK_ROWS)
        columns_nP = dlogits_nV[:, part].to(total_V.dtype)
        total_V[part].add_((columns_nP.T @ weights_n1)[:, 0], alpha=factor)
