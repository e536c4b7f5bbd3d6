"""Mixtures of experts: choose which experts to keep, and narrow them.

Shapes: N rows of the stream, E experts, D hidden width, F FFN width of an expert, K kept neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.pruning.axes import Axes, part
from stillhouse.pruning.calibrate import OwnBatches
from stillhouse.pruning.ffn import Moments, Ranking, best, choose_and_refit
from stillhouse.pruning.surgery import set_parameter


@dataclass(frozen=True)
class RoutedRows:
    """The stream's rows [N, D] for each batch, and each row's weight [N]."""

    batches: OwnBatches
    mids: Sequence[Tensor]
    weights: Sequence[Tensor]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.mids, self.weights, strict=True)


class _Mixture:
    """The parts of one layer's mixture of experts."""

    def __init__(self, layer: nn.Module, axes: Axes) -> None:
        assert axes.experts is not None
        self.names = axes.experts
        self.norm = part(layer, axes.ffn_input_norm)
        self.router = part(layer, f"{axes.ffn}.{self.names.router}")
        self.experts: Any = part(layer, f"{axes.ffn}.{self.names.experts}")
        self.gate_up_EOD: Tensor = getattr(self.experts, self.names.gate_up)
        self.down_EDF: Tensor = getattr(self.experts, self.names.down)

    def routed(self, mid_ND: Tensor, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows routed to one expert: their indices, activations [n, F], and router weights."""
        x_ND = self.norm(mid_ND)
        _, share_NT, chosen_NT = self.router(x_ND)
        rows_n, place_n = (chosen_NT == expert).nonzero(as_tuple=True)
        gate, up = (x_ND[rows_n] @ self.gate_up_EOD[expert].T).chunk(2, dim=-1)
        return rows_n, self.experts.act_fn(gate) * up, share_NT[rows_n, place_n]


def best_experts(layer: nn.Module, axes: Axes, rows: RoutedRows, keep: int) -> Tensor:
    """The `keep` experts that add most to the stream, by Σ router weight × ‖output‖, in ascending
    order.

    REAP (Lasby et al. 2025, arXiv 2510.13999) averages over an expert's rows instead; the sum also
    reflects how often the expert is chosen.
    """
    mixture = _Mixture(layer, axes)
    zeros_E = torch.zeros(len(mixture.down_EDF), device=mixture.down_EDF.device)

    def terms() -> Iterator[list[Tensor]]:
        for mid_ND, weight_N in rows:
            score_E = zeros_E.clone()
            for expert in range(len(score_E)):
                rows_n, activations_nF, share_n = mixture.routed(mid_ND, expert)
                length_n = (activations_nF @ mixture.down_EDF[expert].T).norm(dim=-1)
                score_E[expert] = (share_n * length_n * weight_N[rows_n]).sum()
            yield [score_E]

    (score_E,) = rows.batches.sum(terms(), lambda: [zeros_E.clone()])
    return best(score_E, keep)


def narrow_experts(
    layer: nn.Module,
    axes: Axes,
    rows: RoutedRows,
    keep: int,
    reconstruct: bool,
    ranking: Ranking,
) -> None:
    """Cut every expert to `keep` neurons, based on the rows routed to it.

    Works like a plain FFN (see ffn.py), with rows also weighted by the router. With `reconstruct`,
    each expert is refit to its own output. Does not support ranking by gradients.
    """
    mean = ranking.aggregation == "mean"
    mixture = _Mixture(layer, axes)
    experts, hidden, width = mixture.down_EDF.shape
    gate_ups, downs = [], []
    device = mixture.down_EDF.device
    zeros = partial(Moments.zeros, width, device, absolute=mean)

    def terms(expert: int) -> Iterator[list[Tensor]]:
        for mid_ND, weight_N in rows:
            moments = zeros()
            rows_n, activations_nF, share_n = mixture.routed(mid_ND, expert)
            moments.add(activations_nF, share_n * weight_N[rows_n])
            yield moments.tensors()

    def empty() -> list[Tensor]:
        kept_K = torch.empty(keep, dtype=torch.long, device=device)
        return [kept_K, mixture.down_EDF.new_empty(hidden, keep)]

    for expert in range(experts):
        sums = rows.batches.sum(terms(expert), lambda: zeros().tensors())
        down_DF, moments = mixture.down_EDF[expert], Moments(*sums)
        cut = partial(choose_and_refit, down_DF, moments, keep, ranking, reconstruct)
        kept_K, down_DK = rows.batches.processes.from_owner(0, cut, empty)
        downs.append(down_DK)
        gate_ups.append(mixture.gate_up_EOD[expert][torch.cat([kept_K, kept_K + width])])
    set_parameter(mixture.experts, mixture.names.gate_up, torch.stack(gate_ups))
    set_parameter(mixture.experts, mixture.names.down, torch.stack(downs))
    mixture.experts.intermediate_dim = keep
