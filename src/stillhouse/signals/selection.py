"""Top tokens of rows of probabilities, and draws from them.

Rows are divided into blocks, of which only those that matter are searched, so no row is sorted or
summed twice.

Shapes: n rows, V vocabulary padded to whole blocks, B blocks of a row, C tokens of a block, X
chosen entries of all rows, D draws of all rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.errors import SignalError

BLOCK = 128
SMALLEST_BLOCK = 64
BELOW_ONE, BELOW_ONE_32 = 1.0 - 1e-9, 1.0 - 2.0**-23
"""Fractions of a mass that draws stay below, since two summations can round it differently."""


@dataclass(frozen=True)
class Entries:
    """Chosen tokens, ordered by row: rows_X, ids_X, and their probabilities p_X (float64)."""

    rows_X: Tensor
    ids_X: Tensor
    p_X: Tensor


@dataclass(frozen=True)
class Blocks:
    """Rows of probabilities and the mass of each block of C tokens."""

    p_nV: Tensor
    sums_nB: Tensor
    vocabulary: int

    @property
    def rows(self) -> int:
        return self.p_nV.shape[0]

    @property
    def block(self) -> int:
        return self.p_nV.shape[1] // self.sums_nB.shape[1]

    @property
    def p_blocks(self) -> Tensor:
        """All blocks of all rows, [n · B, C]."""
        return self.p_nV.view(-1, self.block)


def probabilities(logits_nV: Tensor, temperature: float, out: Tensor | None = None) -> Blocks:
    """Compute softmax(logits / temperature) in blocks, written to `out` if its shape fits.

    Raises SignalError for a row with NaN or +inf, or with only -inf.
    """
    vocabulary = logits_nV.shape[1]
    block = math.gcd(vocabulary, BLOCK)
    if temperature != 1.0:
        logits_nV = logits_nV / temperature
    if block < min(SMALLEST_BLOCK, vocabulary):
        block = BLOCK
        logits_nV = torch.nn.functional.pad(logits_nV, (0, -vocabulary % BLOCK), value=-torch.inf)
    if out is not None and out.shape[1] == logits_nV.shape[1] and len(out) >= len(logits_nV):
        p_nV = torch.softmax(logits_nV, 1, out=out[: len(logits_nV)])
    else:
        p_nV = torch.softmax(logits_nV, 1)
    sums_nB = p_nV.unflatten(1, (-1, block)).sum(2)
    if not bool(torch.isfinite(sums_nB.sum())):
        row = int((~torch.isfinite(sums_nB.sum(1))).nonzero()[0])
        raise SignalError(
            f"the teacher's logits contain NaN or +inf, or nothing but -inf, in row {row}",
            fix="check the teacher for an overflow in float16 or a damaged file",
        )
    return Blocks(p_nV, sums_nB, vocabulary)


def at_least(blocks: Blocks, tau: float) -> Entries:
    """Every token with a probability of at least tau."""
    rows_P, block_P = (blocks.sums_nB >= tau).nonzero(as_tuple=True)
    flat_P = rows_P * blocks.sums_nB.shape[1] + block_P
    p_PC = blocks.p_blocks.index_select(0, flat_P)
    place_X, column_X = (p_PC >= tau).nonzero(as_tuple=True)
    ids_X = block_P[place_X] * blocks.block + column_X
    return Entries(rows_P[place_X], ids_X, p_PC[place_X, column_X].double())


def top_tokens(blocks: Blocks, k: int) -> tuple[Tensor, Tensor]:
    """The probabilities and ids [n, k] of each row's k most likely tokens, in descending order.

    All of them are in the k blocks with the largest maxima. Raises SignalError for a k above the
    vocabulary.
    """
    if k > blocks.vocabulary:
        raise SignalError(
            f"the encoding stores {k} tokens per row, but the vocabulary has only "
            f"{blocks.vocabulary}",
            fix="store fewer tokens per row",
        )
    if 2 * k * blocks.block <= blocks.p_nV.shape[1]:
        most_nB = blocks.p_nV.unflatten(1, (-1, blocks.block)).amax(2)
        block_nk = most_nB.topk(k, 1, sorted=False).indices
        row_n1 = torch.arange(blocks.rows, device=block_nk.device)[:, None]
        flat = (row_n1 * most_nB.shape[1] + block_nk).flatten()
        p_nC = blocks.p_blocks.index_select(0, flat).view(blocks.rows, -1)
        top = p_nC.topk(k, 1)
        first_nk = block_nk.gather(1, top.indices // blocks.block) * blocks.block
        ids_nk = first_nk + top.indices % blocks.block
        if bool((ids_nk < blocks.vocabulary).all()):
            return top.values, ids_nk
    # Also needed if so many probabilities are 0 that a padding token is among the k.
    top = blocks.p_nV[:, : blocks.vocabulary].topk(k, 1)
    return top.values, top.indices


def take_out_(blocks: Blocks, entries: Entries) -> None:
    """Set the entries' probabilities to 0, and update the sums of their blocks."""
    blocks.p_nV.view(-1)[entries.rows_X * blocks.p_nV.shape[1] + entries.ids_X] = 0.0
    flat_X = entries.rows_X * blocks.sums_nB.shape[1] + entries.ids_X // blocks.block
    blocks.sums_nB.view(-1)[flat_X] = blocks.p_blocks.index_select(0, flat_X).sum(1)


def locate(blocks: Blocks, rows_D: Tensor, shares_D: Tensor) -> tuple[Tensor, Tensor]:
    """Find the tokens at which a row's running sum exceeds the given fractions of its mass.

    shares_D: fractions in [0, 1) of the mass of the rows in rows_D. Returns ids_D and their
    probabilities. This first searches the running sums of blocks, then within one block each.
    """
    sums_nB = blocks.sums_nB.double()
    upto_nB = sums_nB.cumsum(1)
    mass_n1 = upto_nB[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    # Each row's sums get a separate interval, so that one search serves all rows.
    shift_n1 = 2.0 * torch.arange(blocks.rows, device=rows_D.device, dtype=torch.float64)[:, None]
    shares_D = shares_D.clamp(max=BELOW_ONE)
    flat_D = torch.searchsorted(
        (upto_nB / mass_n1 + shift_n1).flatten(), shares_D + 2.0 * rows_D, right=True
    )
    sum_D = sums_nB.view(-1)[flat_D]
    before_D = upto_nB.view(-1)[flat_D] - sum_D
    within_D = (shares_D * mass_n1[rows_D, 0] - before_D) / sum_D
    p_DC = blocks.p_blocks.index_select(0, flat_D)
    upto_DC = p_DC.cumsum(1)
    goal_D1 = within_D[:, None].float().clamp(0.0, BELOW_ONE_32) * upto_DC[:, -1:]
    column_D1 = torch.searchsorted(upto_DC, goal_D1, right=True)
    block_D = flat_D - rows_D * sums_nB.shape[1]
    return block_D * blocks.block + column_D1[:, 0], p_DC.gather(1, column_D1)[:, 0].double()


def sum_of_squares(p_nV: Tensor) -> Tensor:
    """Σ p² of each row, [n], in float64."""
    return torch.linalg.vector_norm(p_nV, dim=1).double().square()


def place_in_row(rows_X: Tensor, counts_n: Tensor) -> Tensor:
    """The index of each entry within its row, for entries that are ordered by row."""
    first_n = counts_n.cumsum(0) - counts_n
    return torch.arange(len(rows_X), device=rows_X.device) - first_n[rows_X]
