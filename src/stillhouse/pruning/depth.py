"""Choose layers to drop by how much removing each changes the output distribution.

Shapes: R windows of a batch, L tokens, N counted positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.progress import bar
from stillhouse.pruning.calibrate import Batch, layer_inputs, run_layer
from stillhouse.pruning.offload import release_ends
from stillhouse.shared_work import ALONE, Processes
from stillhouse.signals.lm_head import summed_kl
from stillhouse.teachers.activations import decoder_layers
from stillhouse.teachers.backbone import lm_head

SHORTLIST = 8
"""How many layers each round after the first tries again: those with the lowest KL so far."""


@dataclass(frozen=True)
class DepthChoice:
    """Which layers to keep.

    kept: layer numbers, ascending.
    dropped: layer numbers in order of removal, each with the KL after removing it.
    single_kl: for each layer, KL(full ‖ without only that layer) in nats/token; empty if the order
        came from scores.
    """

    kept: tuple[int, ...]
    dropped: tuple[tuple[int, float], ...]
    single_kl: tuple[float, ...]


@torch.no_grad()
def choose_layers(
    model: Any,
    batches: Sequence[Batch],
    keep: int,
    *,
    scores: Sequence[float] | None = None,
    most_kl: float = math.inf,
    processes: Processes = ALONE,
) -> DepthChoice:
    """Drop one layer at a time, always the one whose removal leads to the lowest KL to the full
    model.

    The first round tries every layer; later rounds try the SHORTLIST layers with the lowest KL in
    their last trial. Stops early once the KL exceeds most_kl.

    scores: each layer's importance (see `layer_scores`). If given, the least important layer is
        removed first, and no other removals are tried.
    processes: all of them call this with the same batches, and share the trials.
    """
    total = len(decoder_layers(model))
    scorer = _Scorer(model, batches, processes)
    alive = list(range(total))
    rounds = total - keep
    trials = rounds if scores is not None else total + max(0, rounds - 1) * SHORTLIST
    dropped: list[tuple[int, float]] = []
    with bar("Trying layers", trials, unit="trials") as advance:
        kls = scorer.without_each(alive, alive, advance) if scores is None else {}
        single = tuple(kls[index] for index in range(len(kls)))
        while len(alive) > keep and (not dropped or dropped[-1][1] <= most_kl):
            tried = alive
            if scores is not None:
                tried = [min(alive, key=lambda index: scores[index])]
            elif dropped:
                tried = sorted(alive, key=lambda index: kls[index])[:SHORTLIST]
            if tried is not alive:
                kls.update(scorer.without_each(alive, tried, advance))
            weakest = min(tried, key=lambda index: kls[index])
            dropped.append((weakest, kls[weakest]))
            alive.remove(weakest)
    return DepthChoice(tuple(alive), tuple(dropped), single)


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # ShortGPT, Men et al. 2024, arXiv 2403.03853
    "block_influence": lambda x_ND, y_ND: 1 - torch.cosine_similarity(x_ND, y_ND, dim=-1),
    # Ministral 3, arXiv 2601.08584
    "norm_ratio": lambda x_ND, y_ND: y_ND.norm(dim=-1) / x_ND.norm(dim=-1).clamp_min(1e-12),
}
"""A layer's importance, given the stream [N, D] before and after it."""


@torch.no_grad()
def layer_scores(model: Any, batches: Sequence[Batch], by: str) -> list[float]:
    """How much each layer changes the stream, measured by `SCORES[by]` and averaged over the
    counted rows. A low score means that the layer is redundant."""
    layers = decoder_layers(model)
    sums = [0.0] * len(layers)
    rows = 0
    for batch in batches:
        inputs = layer_inputs(model, batch)
        before_RLD = inputs.hidden_RLD
        rows += int(batch.counted_RL.sum())
        for index, layer in enumerate(layers):
            after_RLD = run_layer(layer, before_RLD, inputs.extras[index])
            x_ND = before_RLD[batch.counted_RL].double()
            y_ND = after_RLD[batch.counted_RL].double()
            sums[index] += SCORES[by](x_ND, y_ND).sum().item()
            before_RLD = after_RLD
    return [value / max(rows, 1) for value in sums]


class _Scorer:
    """Measures the KL without some layers, on the calibration rows."""

    def __init__(self, model: Any, batches: Sequence[Batch], processes: Processes) -> None:
        self.processes = processes
        self.layers = decoder_layers(model)
        self.norm = model.base_model.norm
        self.head = lm_head(model)
        self.batches = batches
        self.inputs = [layer_inputs(model, batch) for batch in batches]
        self.full = []
        for batch, inputs in zip(batches, self.inputs, strict=True):
            hidden_RLD = inputs.hidden_RLD
            for index, layer in enumerate(self.layers):
                hidden_RLD = run_layer(layer, hidden_RLD, inputs.extras[index])
            self.full.append(self._rows(batch, hidden_RLD))
        release_ends(model)

    def without_each(
        self, alive: Sequence[int], candidates: Sequence[int], advance: Any
    ) -> dict[int, float]:
        """For each candidate, KL(full ‖ the layers `alive` without that candidate). The processes
        share the candidates.

        The stream before a candidate is computed only once. All trials run through one layer before
        the next, so that its weights are read only once.
        """
        own = self.processes.in_turn(candidates)
        sums = dict.fromkeys(own, 0.0)
        for full_ND, batch, inputs in zip(self.full, self.batches, self.inputs, strict=True):
            trials: dict[int, Tensor] = {}
            before_RLD, pending = inputs.hidden_RLD, set(own)
            for index in alive:
                layer, extras = self.layers[index], inputs.extras[index]
                for tried, hidden_RLD in trials.items():
                    trials[tried] = run_layer(layer, hidden_RLD, extras)
                if index in pending:
                    trials[index] = before_RLD
                    pending.remove(index)
                if pending:
                    before_RLD = run_layer(layer, before_RLD, extras)
            order = list(trials)
            rows = [self._rows(batch, trials.pop(tried)) for tried in order]
            for tried, value in zip(order, summed_kl(self.head, full_ND, rows), strict=True):
                sums[tried] += value
        advance(len(candidates))
        counted = max(1, sum(len(full_ND) for full_ND in self.full))
        kls = {index: value / counted for index, value in sums.items()}
        return {index: kl for each in self.processes.collect(kls) for index, kl in each.items()}

    def _rows(self, batch: Batch, hidden_RLD: Tensor) -> Tensor:
        rows_ND: Tensor = self.norm(hidden_RLD)[batch.counted_RL]
        return rows_ND
