"""The memory of the fused loss (objectives/fused.py): logit tiles, hidden states, and the LM head's
gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stillhouse.objectives.chunk_loop import rows_per_block, rows_per_chunk, rows_per_part
from stillhouse.objectives.products import HEAD_BLOCK_ROWS_CUDA, adds_products_wide


@dataclass(frozen=True)
class LossSizes:
    """Sizes in bytes.

    tiles: tiles of logits, buffers of the same shape, and a copy of the LM head in the compute
    dtype; freed once the loss is known. rows: both models' hidden states and their gradient.
    head_gradient: the LM head's float32 gradient until it becomes the parameter's.
    """

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
    """Compute the sizes for a micro-batch.

    rows: the number of supervised tokens. teachers: the hidden sizes of live teachers; empty if
    signals are cached or there is no teacher. kernels: whether the Triton kernels run, which need
    no float32 tiles. only_kl: whether forward KL and cross-entropy are the only terms. copies_head:
    whether the student's LM head has a different dtype than its products.
    """
    width, cuda = compute.itemsize, device == "cuda"
    chunk = min(rows, rows_per_chunk(hidden, compute, device))
    part = chunk if kernels else rows_per_part(chunk, compute, device)
    block = rows_per_block(part, vocabulary, compute, device)
    models = 2 if teachers else 1
    buffers = 0
    if not kernels:
        buffers = models if width < 4 else 0
        if teachers:  # besides the logits (objectives/dense.py)
            buffers += 1 if only_kl else 5
    logits = chunk + (part if teachers else 0)
    tiles = logits * vocabulary * width + buffers * block * vocabulary * 4
    if cuda and trained_head and width < 4 and not adds_products_wide(device):
        tiles += min(vocabulary, HEAD_BLOCK_ROWS_CUDA) * hidden * 4
    if copies_head:
        tiles += vocabulary * hidden * width
    # The hidden states in float32 and in the compute dtype, and their gradient.
    own = rows * hidden * (4 + 2 * width)
    return LossSizes(
        tiles=tiles,
        rows=own + rows * sum(teachers) * width,
        head_gradient=vocabulary * hidden * 4 if trained_head else 0,
    )
