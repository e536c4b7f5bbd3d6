"""Mixtures of experts: choose which experts to keep, and narrow them.

Shapes: N rows of the stream, n of them routed to one expert, E experts, D hidden width, F FFN width
of an expert, K kept neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stillhouse.pruning.axes import Axes
from stillhouse.pruning.calibrate import OwnBatches
from stillhouse.pruning.refit import Ranking, agreed_cut, best, choose_and_refit, summed_moments
from stillhouse.pruning.surgery import set_parameter

Rows = Sequence[tuple[Tensor, Tensor]]
"""The stream's rows [N, D] for each batch, and each row's weight [N]."""


def _routed(layer: Any, axes: Axes, mid_ND: Tensor, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows routed to one expert: their indices, activations [n, F], and router weights."""
    experts, x_ND = layer.mlp.experts, getattr(layer, axes.ffn_input_norm)(mid_ND)
    _, share_NT, chosen_NT = layer.mlp.gate(x_ND)
    rows_n, place_n = (chosen_NT == expert).nonzero(as_tuple=True)
    gate, up = (x_ND[rows_n] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    return rows_n, experts.act_fn(gate) * up, share_NT[rows_n, place_n]


def best_experts(layer: Any, axes: Axes, batches: OwnBatches, rows: Rows, keep: int) -> Tensor:
    """The `keep` experts that add most to the stream, by Σ router weight × ‖output‖, in ascending
    order.

    REAP (Lasby et al. 2025, arXiv 2510.13999) averages over an expert's rows instead; the sum also
    reflects how often the expert is chosen.
    """
    down_EDF = layer.mlp.experts.down_proj
    zeros_E = torch.zeros(len(down_EDF), device=down_EDF.device)

    def terms() -> Iterator[list[Tensor]]:
        for mid_ND, weight_N in rows:
            score_E = zeros_E.clone()
            for expert, down_DF in enumerate(down_EDF):
                rows_n, activations_nF, share_n = _routed(layer, axes, mid_ND, expert)
                length_n = (activations_nF @ down_DF.T).norm(dim=-1)
                score_E[expert] = (share_n * length_n * weight_N[rows_n]).sum()
            yield [score_E]

    (score_E,) = batches.sum(terms(), lambda: [zeros_E.clone()])
    return best(score_E, keep)


def narrow_experts(
    layer: Any,
    axes: Axes,
    batches: OwnBatches,
    rows: Rows,
    keep: int,
    reconstruct: bool,
    ranking: Ranking,
) -> None:
    """Cut every expert to `keep` neurons, based on the rows routed to it.

    Works like a plain FFN, with rows also weighted by the router. With `reconstruct`, each expert
    is refit to its own output. Does not support ranking by gradients.
    """
    experts = layer.mlp.experts
    gate_ups, downs = [], []

    def read(expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        for mid_ND, weight_N in rows:
            rows_n, activations_nF, share_n = _routed(layer, axes, mid_ND, expert)
            yield activations_nF, share_n * weight_N[rows_n]

    for expert, (gate_up_OD, down_DF) in enumerate(
        zip(experts.gate_up_proj, experts.down_proj, strict=True)
    ):
        moments = summed_moments(batches, read(expert), down_DF, ranking)
        cut = partial(choose_and_refit, down_DF, moments, keep, ranking, reconstruct)
        kept_K, down_DK = agreed_cut(batches.processes, cut, down_DF, keep)
        downs.append(down_DK)
        gate_ups.append(gate_up_OD[torch.cat([kept_K, kept_K + down_DF.shape[1]])])
    set_parameter(experts, "gate_up_proj", torch.stack(gate_ups))
    set_parameter(experts, "down_proj", torch.stack(downs))
    experts.intermediate_dim = keep
