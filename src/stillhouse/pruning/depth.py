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
from stillhouse.pruning.calibrate import Batch, LayerInputs, layer_inputs, run_layer
from stillhouse.signals.lm_head import summed_kl
from stillhouse.teachers.activations import decoder_layers
from stillhouse.teachers.backbone import lm_head

HELD = 8
"""Layers whose trials are measured together, against logits of the full model computed once. Their
rows are in memory until then: for all layers of a large model, they would be as large as a
layer."""

SHORTLIST = 8
"""Layers tried again in each round after the first: those with the lowest cost so far."""


@dataclass(frozen=True)
class DepthChoice:
    """kept: layer numbers, ascending. dropped: in order of removal, with the KL after each.

    single_kl: KL(full ‖ without that layer alone) in nats/token, by layer; empty if the order
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
) -> DepthChoice:
    """Drop one layer at a time, each time the one whose removal adds the least KL to the full
    model.

    The first round tries every layer; later ones the SHORTLIST cheapest by their last trial.
    scores: the importance of each layer (see `layer_scores`): the least important is removed first,
    and only these removals are tried. Stops early once the KL is above most_kl.
    """
    total = len(decoder_layers(model))
    if scores is not None:
        return _by_scores(model, batches, keep, scores, most_kl)
    scorer = _Scorer(model, batches)
    alive = list(range(total))
    rounds = total - keep
    trials = (total + max(0, rounds - 1) * SHORTLIST) * len(batches)
    dropped: list[tuple[int, float]] = []
    with bar("Trying layers", trials, unit="trials") as advance:
        last = scorer.without_each(alive, alive, advance)
        single = tuple(last[index] for index in range(total))
        while len(alive) > keep and (not dropped or dropped[-1][1] <= most_kl):
            if dropped:
                shortlist = sorted(alive, key=lambda index: last[index])[:SHORTLIST]
                last.update(scorer.without_each(alive, shortlist, advance))
            else:
                shortlist = alive
            weakest = min(shortlist, key=lambda index: last[index])
            dropped.append((weakest, last[weakest]))
            alive.remove(weakest)
    return DepthChoice(tuple(alive), tuple(dropped), single)


def _by_scores(
    model: Any, batches: Sequence[Batch], keep: int, scores: Sequence[float], most_kl: float
) -> DepthChoice:
    scorer = _Scorer(model, batches)
    alive = list(range(len(scores)))
    dropped: list[tuple[int, float]] = []
    with bar("Dropping layers", (len(scores) - keep) * len(batches), unit="trials") as advance:
        while len(alive) > keep and (not dropped or dropped[-1][1] <= most_kl):
            weakest = min(alive, key=lambda index: scores[index])
            kl = scorer.without_each(alive, [weakest], advance)[weakest]
            dropped.append((weakest, kl))
            alive.remove(weakest)
    return DepthChoice(tuple(alive), tuple(dropped), ())


def _block_influence(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """1 - cos(in, out) (Men et al. 2024, ShortGPT, arXiv 2403.03853)."""
    return 1 - torch.cosine_similarity(x_ND, y_ND, dim=-1)


def _norm_ratio(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """‖out‖ / ‖in‖ (Ministral 3, arXiv 2601.08584)."""
    return y_ND.norm(dim=-1) / x_ND.norm(dim=-1).clamp_min(1e-12)


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "block_influence": _block_influence,
    "norm_ratio": _norm_ratio,
}
"""Importance of a layer by the stream [N, D] before and after it."""


@torch.no_grad()
def layer_scores(model: Any, batches: Sequence[Batch], by: str) -> list[float]:
    """How much each layer changes the stream, by `SCORES[by]`, averaged over the counted rows; low
    means redundant."""
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
    """Holds the calibration rows, and the full model's output on them."""

    def __init__(self, model: Any, batches: Sequence[Batch]) -> None:
        self.layers = decoder_layers(model)
        self.norm = model.base_model.norm
        self.head = lm_head(model)
        self.batches = batches
        self.inputs = [layer_inputs(model, batch) for batch in batches]
        everything = range(len(self.layers))
        self.full = [self._rows(batch, inputs, everything) for batch, inputs in self._pairs()]

    def without_each(
        self, alive: Sequence[int], candidates: Sequence[int], advance: Any
    ) -> dict[int, float]:
        """KL(full ‖ the layers `alive` less one), for each candidate.

        The stream before a candidate is computed only once.
        """
        pending = set(candidates)
        sums = dict.fromkeys(candidates, 0.0)
        for full_ND, (batch, inputs) in zip(self.full, self._pairs(), strict=True):
            rows: dict[int, Tensor] = {}
            hidden_RLD = inputs.hidden_RLD
            for place, index in enumerate(alive):
                if index in pending:
                    rows[index] = self._rows(batch, inputs, alive[place + 1 :], hidden_RLD)
                    advance(1)
                    if len(rows) == HELD:
                        self._add_kl(sums, full_ND, rows)
                hidden_RLD = run_layer(self.layers[index], hidden_RLD, inputs.extras[index])
            self._add_kl(sums, full_ND, rows)
        counted = max(1, sum(len(full_ND) for full_ND in self.full))
        return {index: value / counted for index, value in sums.items()}

    def _add_kl(self, sums: dict[int, float], full_ND: Tensor, rows: dict[int, Tensor]) -> None:
        """Add the KL of each of `rows` to its sum, and clear `rows`."""
        found = summed_kl(self.head, full_ND, list(rows.values()))
        for index, value in zip(rows, found, strict=True):
            sums[index] += value
        rows.clear()

    def _pairs(self) -> list[tuple[Batch, LayerInputs]]:
        return list(zip(self.batches, self.inputs, strict=True))

    def _rows(
        self,
        batch: Batch,
        inputs: LayerInputs,
        layers: Sequence[int],
        hidden_RLD: Tensor | None = None,
    ) -> Tensor:
        hidden_RLD = inputs.hidden_RLD if hidden_RLD is None else hidden_RLD
        for index in layers:
            hidden_RLD = run_layer(self.layers[index], hidden_RLD, inputs.extras[index])
        rows_ND: Tensor = self.norm(hidden_RLD)[batch.counted_RL]
        return rows_ND
