"""The memory of the fused loss (objectives/fused.py): tiles of logits, and the head's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stillhouse.objectives.chunk_loop import rows_per_block, rows_per_chunk, rows_per_part
from stillhouse.objectives.products import HEAD_BLOCK_ROWS_CUDA, adds_products_wide


@dataclass(frozen=True)
class LossSizes:
    """Bytes. tiles: logits and their like, and the head as products need it, freed when the loss is
    known. rows: hidden rows of both models and their gradient. head_gradient: float32, until it is
    the head's."""

    tiles: float
    rows: float
    head_gradient: float


def loss_sizes(
    rows: int,
    vocabulary: int,
    hidden: int,
    teachers: tuple[int, ...],
    *,
    compute: torch.dtype,
    device: str,
    kernels: bool,
    only_kl: bool,
    trained_head: bool,
    copies_head: bool,
) -> LossSizes:
    """Of a micro-batch.

    rows: supervised tokens. teachers: hidden widths of those that answer live; empty where signals
    are stored, or there are none. kernels: whether Triton's kernels run, which need no float32
    tiles. only_kl: whether forward KL and cross-entropy are the only terms. copies_head: whether
    the student's head has another number type than products.
    """
    width, cuda = compute.itemsize, device == "cuda"
    chunk = min(rows, rows_per_chunk(hidden, compute, device))
    part = chunk if kernels else rows_per_part(chunk, compute, device)
    block = rows_per_block(part, vocabulary, compute, device)
    models = 2 if teachers else 1
    buffers = 0
    if not kernels:
        buffers = (models if width < 4 else 0) + _scratch(bool(teachers), only_kl)
    logits = chunk + (part if teachers else 0)
    tiles = logits * vocabulary * width + buffers * block * vocabulary * 4
    if cuda and trained_head and width < 4 and not adds_products_wide(device):
        tiles += min(vocabulary, HEAD_BLOCK_ROWS_CUDA) * hidden * 4
    if copies_head:
        tiles += vocabulary * hidden * width
    own = rows * hidden * (4 + 2 * width)  # as they come, in the compute type, and the gradient
    return LossSizes(
        tiles=tiles,
        rows=own + rows * sum(teachers) * width,
        head_gradient=vocabulary * hidden * 4 if trained_head else 0,
    )


def _scratch(dense: bool, only_kl: bool) -> int:
    """Float32 buffers of a block beside the logits (objectives/dense.py)."""
    if not dense:
        return 0
    return 1 if only_kl else 5
