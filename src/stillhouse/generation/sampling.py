"""Chooses the next token of each sequence, by greedy decoding or sampling.

A row's token depends only on that row.

Shapes: B sequences, V vocabulary, C blocks of W tokens, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 256
"""Tokens per block. A few passes over the vocabulary find the block, and a short one the token."""
_NUCLEI = (64, 512)
"""Numbers of most probable tokens that top_p tries before it sorts the full vocabulary."""


def next_tokens(
    logits_BV: Tensor,
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    uniforms: Sequence[float],
) -> list[int]:
    """Choose a token for each row.

    At temperature 0, it is the most probable token. Otherwise, it is drawn by inverse transform
    sampling; with top_p < 1, from the smallest set of most probable tokens whose mass is at least
    top_p. uniforms: random numbers in [0, 1); not used at temperature 0.
    """
    count = len(logits_BV)
    greedy = [row for row in range(count) if temperatures[row] <= 0]
    full = [row for row in range(count) if temperatures[row] > 0 and top_ps[row] >= 1]
    nucleus = [row for row in range(count) if temperatures[row] > 0 and top_ps[row] < 1]

    def numbers(values: Sequence[float], rows: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor([values[row] for row in rows], dtype=dtype, device=logits_BV.device)

    def probabilities(rows: list[int]) -> Tensor:
        scale_B1 = numbers(temperatures, rows, torch.float32)[:, None]
        return torch.softmax(_rows(logits_BV, rows).float() / scale_B1, -1)

    tokens_B = torch.zeros(count, dtype=torch.long, device=logits_BV.device)
    if greedy:
        tokens_B[greedy] = most_probable(_rows(logits_BV, greedy))
    if full:
        tokens_B[full] = _draw(probabilities(full), numbers(uniforms, full, torch.float64))
    if nucleus:
        tokens_B[nucleus] = _draw_nucleus(
            probabilities(nucleus),
            numbers(top_ps, nucleus, torch.float64),
            numbers(uniforms, nucleus, torch.float64),
        )
    return tokens_B.tolist()


def most_probable(logits_BV: Tensor) -> Tensor:
    """Same as `logits_BV.argmax(-1)`, but many times faster on a CPU: [B]."""
    blocks_BCW = _blocks(logits_BV, -torch.inf)
    block_B = blocks_BCW.amax(-1).argmax(-1)
    return block_B * _BLOCK + _block(blocks_BCW, block_B).argmax(-1)


def _rows(values_BV: Tensor, rows: list[int]) -> Tensor:
    return values_BV if len(rows) == len(values_BV) else values_BV[rows]


def _draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw a token from each row: [B]."""
    blocks_BCW = _blocks(probabilities_BV, 0.0)
    block_B, rest_B = _find(blocks_BCW.sum(-1), uniform_B)
    place_B, _ = _find(_block(blocks_BCW, block_B), rest_B)
    return block_B * _BLOCK + place_B


def _draw_nucleus(probabilities_BV: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw a token from each row's nucleus: [B]. Ties are ordered as by torch's topk."""
    vocabulary = probabilities_BV.shape[1]
    tokens_B = torch.zeros_like(uniform_B, dtype=torch.long)
    rows_B = torch.arange(len(tokens_B), device=tokens_B.device)
    for size in (*_NUCLEI, vocabulary):
        values_BK, ids_BK = probabilities_BV[rows_B].topk(min(size, vocabulary))
        sums_BK = values_BK.double().cumsum(-1)
        limit_B1 = top_p_B[rows_B, None]
        inside_BK = F.pad(sums_BK, (1, -1)) < limit_B1
        at_B, _ = _find(torch.where(inside_BK, values_BK, 0.0), uniform_B[rows_B])
        tokens_B[rows_B] = ids_BK.gather(1, at_B[:, None])[:, 0]
        if size >= vocabulary:
            break
        rows_B = rows_B[sums_BK[:, -1] < limit_B1[:, 0]]
        if not len(rows_B):
            break
    return tokens_B


def _find(weights_BK: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Find the entry in each row where the cumulative sum reaches a share `uniform` of the total.

    Returns the entries and the share of each entry's weight below that point, [B] each. An entry
    with zero weight is never returned.
    """
    weights_BK = weights_BK.double()
    sums_BK = weights_BK.cumsum(-1)
    goal_B1 = uniform_B[:, None] * sums_BK[:, -1:]
    at_B1 = torch.searchsorted(sums_BK, goal_B1, right=True)
    # The product may be rounded up to the sum itself.
    last_B1 = torch.searchsorted(sums_BK, sums_BK[:, -1:].contiguous())
    at_B1 = torch.minimum(at_B1, last_B1)
    weight_B1 = weights_BK.gather(1, at_B1)
    below_B1 = goal_B1 - (sums_BK.gather(1, at_B1) - weight_B1)
    return at_B1[:, 0], (below_B1 / weight_B1).clamp(0, 1)[:, 0]


def _blocks(values_BV: Tensor, padding: float) -> Tensor:
    """Split the vocabulary into blocks: [B, C, W]."""
    short = -values_BV.shape[1] % _BLOCK
    padded = F.pad(values_BV, (0, short), value=padding) if short else values_BV
    return padded.unflatten(1, (-1, _BLOCK))


def _block(blocks_BCW: Tensor, block_B: Tensor) -> Tensor:
    return blocks_BCW[torch.arange(len(block_B), device=block_B.device), block_B]
