"""Remove FFN neurons or heads, and refit the projection that reads them, so that the remaining ones
compensate.

With activations a (N × F, computed from the stream of the partly cut model) and down projection W
(D × F):

    C = aᵀ a + λ·mean(diag(aᵀ a))·I

Removing a neuron q and optimally refitting the rest costs ‖w_q‖² / [C⁻¹]_qq (optimal brain surgeon:
Hassibi and Stork 1993; per column of a layer: Frantar and Alistarh 2023, arXiv 2301.00774). Neurons
are removed in groups; after removing the set Q, the refit and the new inverse are

    W ← W - W_Q (C⁻¹_QQ)⁻¹ C⁻¹_Q,:          C⁻¹ ← C⁻¹ - C⁻¹_:,Q (C⁻¹_QQ)⁻¹ C⁻¹_Q,:

Attention's output projection reads the concatenated heads, so a head is a block of head_dim
columns, and a group (the query heads that share a key-value head) is a block of heads. Removing the
block Q and optimally refitting the rest costs

    tr(W_Q (C⁻¹_QQ)⁻¹ W_Qᵀ)

Whole groups are removed first. Then the cheapest heads are removed one by one, until each group has
its new size.

Shapes: N rows, F neurons, A attention width (heads × head_dim), H heads, K kept columns, Q removed
ones, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.pruning.calibrate import OwnBatches
from stillhouse.pruning.gradients import Fisher
from stillhouse.pruning.pruning_config import Aggregation, Importance
from stillhouse.pruning.sizes import Sizes
from stillhouse.shared_work import Processes

RIDGE = 1e-3
"""λ, as a fraction of the mean activation energy; added to the diagonal."""

GROUPS_PER_WIDTH = 48
"""Each refit removes 1/48 of the neurons, such as 32 of 1536. Larger groups are faster, but lose
pairs of neurons that could have compensated for each other."""

SYMMETRIC_BLOCKS = 4


@dataclass(frozen=True)
class Ranking:
    """How the parts to keep are ranked.

    by: "refit" (the error that remains after optimally refitting the rest), "activations", or
        "gradients".
    aggregation: how activations are aggregated over rows, for "activations".
    fisher: the Fisher information, for "gradients".
    """

    by: Importance = "refit"
    aggregation: Aggregation = "l2"
    fisher: Fisher | None = None


@dataclass
class Moments:
    """Weighted second moments C = aᵀ a of the activations that a projection reads. Only the upper
    triangle is filled."""

    C_FF: Tensor
    absolute_F: Tensor | None = None
    """Σ |a|; None if not needed."""

    @classmethod
    def zeros(
        cls, width: int, device: torch.device | str = "cpu", *, absolute: bool = False
    ) -> Moments:
        return cls(
            torch.zeros(width, width, device=device),
            torch.zeros(width, device=device) if absolute else None,
        )

    def add(self, activations_NF: Tensor, weight_N: Tensor) -> None:
        """Add rows, each of which counts weight² times."""
        weighted_NF = activations_NF * weight_N[:, None]
        for block in self.blocks():
            read_Nb, read_Nf = weighted_NF[:, block], weighted_NF[:, block.start :]
            self.C_FF[block, block.start :].addmm_(read_Nb.T, read_Nf)
        if self.absolute_F is not None:
            self.absolute_F += weighted_NF.abs().sum(0)

    def blocks(self) -> list[slice]:
        """Blocks of C's rows, each summed from its own first column on. Since C is symmetric, the
        blocks on and above the diagonal suffice, which is 5/8 of the work."""
        width = -(-len(self.C_FF) // SYMMETRIC_BLOCKS)
        return [slice(start, start + width) for start in range(0, len(self.C_FF), width)]

    def tensors(self) -> list[Tensor]:
        """The arguments of `Moments(*tensors)`; their sums are the moments of all rows."""
        return [self.C_FF, *([] if self.absolute_F is None else [self.absolute_F])]

    @property
    def unit(self) -> Tensor:
        """The mean activation energy; 1 if nothing was active."""
        energy = self.C_FF.diagonal().mean()
        return torch.where(energy > 0, energy, 1.0)

    def symmetric(self) -> Tensor:
        """The full matrix C, mirrored from the sums on and above the diagonal."""
        full_FF = self.C_FF.triu()
        for block in self.blocks():
            after = slice(block.stop, None)
            full_FF[after, block] = full_FF[block, after].T
            corner = full_FF[block, block]
            corner += corner.triu(1).T
        return full_FF


def summed_moments(
    batches: OwnBatches,
    rows: Iterable[tuple[Tensor, Tensor]],
    weight_DF: Tensor,
    ranking: Ranking,
) -> Moments:
    """The moments over all processes of the activations that a projection reads.

    rows: activations [N, F] and weights [N] for each batch.
    """
    mean = ranking.aggregation == "mean"
    zeros = partial(Moments.zeros, weight_DF.shape[1], weight_DF.device, absolute=mean)

    def terms() -> Iterator[list[Tensor]]:
        for activations_NF, weight_N in rows:
            moments = zeros()
            moments.add(activations_NF, weight_N)
            yield moments.tensors()

    return Moments(*batches.sum(terms(), lambda: zeros().tensors()))


def agreed_cut(
    processes: Processes,
    cut: Callable[[], Sequence[Tensor]],
    weight_DF: Tensor,
    keep: int,
) -> list[Tensor]:
    """Cut a projection in one process, since all must keep the same columns. cut: returns their
    indices [K], and the new projection [D, K]."""

    def empty() -> list[Tensor]:
        kept_K = torch.empty(keep, dtype=torch.long, device=weight_DF.device)
        return [kept_K, weight_DF.new_empty(len(weight_DF), keep)]

    return processes.from_owner(0, cut, empty)


def activation_scores(moments: Moments, down_DF: Tensor) -> Tensor:
    """Squared activation norm × squared column norm, [F]; (Σ|a|)² replaces Σa² if it was summed."""
    l2_F, absolute_F = moments.C_FF.diagonal(), moments.absolute_F
    size_F = l2_F if absolute_F is None else absolute_F.square()
    return size_F * down_DF.square().sum(0)


def best(score_F: Tensor, keep: int) -> Tensor:
    """The indices of the `keep` highest scores, ascending, [K]."""
    return score_F.topk(keep).indices.sort().values


def refit_to(down_DF: Tensor, moments: Moments, kept_K: Tensor) -> Tensor:
    """The down projection [D, K] of the kept neurons, refit to the output of all neurons."""
    lost_F = torch.ones(down_DF.shape[1], dtype=torch.bool, device=down_DF.device)
    lost_F[kept_K] = False
    if not lost_F.any():
        return down_DF
    inverse = inverse_moments(moments, RIDGE)
    return without_columns(down_DF, inverse, lost_F.nonzero()[:, 0])[0]


def refit_and_remove(down_DF: Tensor, moments: Moments, keep: int) -> tuple[Tensor, Tensor]:
    """Remove neurons down to `keep`. Return the kept ones [K], ascending, and their refit down
    projection [D, K]."""
    group = max(1, down_DF.shape[1] // GROUPS_PER_WIDTH)
    weight, inverse = down_DF, inverse_moments(moments, RIDGE)
    alive = torch.arange(down_DF.shape[1], device=down_DF.device)
    while len(alive) > keep:
        count = min(group, len(alive) - keep)
        cost = weight.square().sum(0) / inverse.diagonal()
        removed = cost.topk(count, largest=False).indices
        weight, inverse, kept_K = without_columns(weight, inverse, removed)
        alive = alive[kept_K]
    return alive, weight


def choose_and_refit(
    down_DF: Tensor,
    moments: Moments,
    keep: int,
    ranking: Ranking,
    reconstruct: bool,
    score_F: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the neurons that `ranking` keeps [K], ascending, and their down projection [D, K],
    refit if `reconstruct`. score_F: replaces the activations' scores."""
    if reconstruct and ranking.by == "refit":
        return refit_and_remove(down_DF, moments, keep)
    kept_K = best(activation_scores(moments, down_DF) if score_F is None else score_F, keep)
    return kept_K, refit_to(down_DF, moments, kept_K) if reconstruct else down_DF[:, kept_K]


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


def _order(
    before: Sizes, after: Sizes, cost: Callable[[Sequence[int]], float]
) -> Iterator[list[int]]:
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


def inverse_moments(moments: Moments, ridge: float) -> Tensor:
    """C⁻¹ [F, F] in units of the mean activation energy, so that the scale does not matter."""
    return regularized_inverse(moments.symmetric().div_(moments.unit), ridge)


def without_columns(
    weight: Tensor, inverse: Tensor, removed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return W and C⁻¹ after removing some columns and refitting the others, whose indices [K] are
    returned, too.

    Overwrites the given inverse, because for a wide FFN each such matrix is as large as a layer.
    """
    stays_F = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    stays_F[removed] = False
    kept_K = stays_F.nonzero()[:, 0]
    rows_QF = inverse[removed]
    solved_QF = torch.linalg.solve(rows_QF[:, removed], rows_QF)
    weight = (weight - weight[:, removed] @ solved_QF)[:, kept_K]
    inverse.addmm_(rows_QF.T, solved_QF, alpha=-1)
    kept_KF = inverse[: len(kept_K)]
    kept_KF.copy_(inverse.index_select(0, kept_K))
    return weight, kept_KF.index_select(1, kept_K), kept_K


def regularized_inverse(C_FF: Tensor, ridge: float) -> Tensor:
    """(C + ridge·I)⁻¹, computed in C's memory. The ridge grows until the sum is positive definite
    despite rounding."""
    added = 0.0
    while True:
        C_FF.diagonal().add_(ridge - added)
        factor_FF, failed = torch.linalg.cholesky_ex(C_FF)
        if not failed.item():
            return torch.cholesky_inverse(factor_FF, out=C_FF)
        added, ridge = ridge, max(10 * ridge, 1e-6)
        if ridge >= 1e3:
            raise ModelError(
                "the activations of the model to prune are not finite: its weights probably "
                "contain NaN or infinity",
                fix="download or copy the model again",
            )
