"""Remove query heads and key-value groups, and refit the output projection to the rest.

The output projection W (D × A, A = heads × head_dim) reads the concatenated heads, so a head is a
block of head_dim columns, and a group (the query heads that share a key-value head) is a block of
heads. As with FFN neurons (see ffn.py), with C = aᵀa + λI, removing the block Q and optimally
refitting the rest costs

    tr(W_Q (C⁻¹_QQ)⁻¹ W_Qᵀ)

Whole groups are removed first. Then the cheapest heads are removed one by one, until each group has
its new size.

Shapes: A attention width, D hidden width, Q columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stillhouse.pruning.ffn import (
    RIDGE,
    Moments,
    Ranking,
    activation_scores,
    inverse_moments,
    refit_to,
    without_columns,
)
from stillhouse.pruning.sizes import Sizes

Cost = Callable[[Sequence[int]], float]


def choose_heads_and_refit(
    output_DA: Tensor,
    moments: Moments,
    before: Sizes,
    after: Sizes,
    ranking: Ranking,
    reconstruct: bool,
    score_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the columns of the heads that `ranking` keeps [K], ascending, and their output
    projection [D, K], refit if `reconstruct`. score_H: replaces the activations' scores."""
    if reconstruct and ranking.by == "refit":
        kept, output_DK = refit_and_remove_heads(output_DA, moments, before, after)
        return torch.tensor(before.columns(kept), device=output_DA.device), output_DK
    if score_H is None:
        score_A = activation_scores(moments, output_DA)
        score_H = score_A.view(before.heads, before.head_dim).sum(1)
    kept = heads_by_score(score_H, before, after)
    kept_K = torch.tensor(before.columns(kept), device=output_DA.device)
    return kept_K, refit_to(output_DA, moments, kept_K) if reconstruct else output_DA[:, kept_K]


def refit_and_remove_heads(
    output_DA: Tensor, moments: Moments, before: Sizes, after: Sizes
) -> tuple[tuple[int, ...], Tensor]:
    """Return the kept heads, ascending, and their refit output projection [D, heads·head_dim]."""
    weight, inverse = output_DA, inverse_moments(moments, RIDGE)
    alive = list(range(before.heads))

    def places(heads: Sequence[int]) -> Tensor:
        return torch.tensor(
            before.columns([alive.index(head) for head in heads]), device=weight.device
        )

    def cost(heads: Sequence[int]) -> float:
        block = places(heads)
        W_DQ = weight[:, block]
        return (W_DQ * torch.linalg.solve(inverse[block][:, block], W_DQ.T).T).sum().item()

    for heads in _order(before, after, cost):
        weight, inverse, _ = without_columns(weight, inverse, places(heads))
        alive = [head for head in alive if head not in heads]
    return tuple(alive), weight


def heads_by_score(score_H: Tensor, before: Sizes, after: Sizes) -> tuple[int, ...]:
    """The heads to keep by score, ascending; a group's score is the sum of its heads' scores."""

    def cost(heads: Sequence[int]) -> float:
        return score_H[list(heads)].sum().item()

    gone = {head for heads in _order(before, after, cost) for head in heads}
    return tuple(head for head in range(before.heads) if head not in gone)


def _order(before: Sizes, after: Sizes, cost: Cost) -> Iterator[list[int]]:
    """Yield blocks of heads to remove, one after another; costs are recomputed after each."""
    members = {
        group: list(range(group * before.share, (group + 1) * before.share))
        for group in range(before.kv_heads)
    }
    while len(members) > after.kv_heads:
        yield members.pop(min(members, key=lambda group: cost(members[group])))
    while candidates := [
        (group, head)
        for group, heads in members.items()
        if len(heads) > after.share
        for head in heads
    ]:
        group, head = min(candidates, key=lambda each: cost([each[1]]))
        members[group].remove(head)
        yield [head]
