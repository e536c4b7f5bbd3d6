"""Chooses layers to drop by what the output distribution loses without each.

Shapes: R windows of a batch, L tokens, N counted positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.progress import bar
from stillhouse.pruning.axes import decoder_layers
from stillhouse.pruning.calibrate import Batch, LayerInputs, layer_inputs, run_layer
from stillhouse.signals import LMHead
from stillhouse.teachers.backbone import head_logits, lm_head

CHUNK = 512
"""Rows of logits that are held at once."""

SHORTLIST = 8
"""Layers tried again in each round after the first: those that cost least so far."""


@dataclass(frozen=True)
class DepthChoice:
    """kept: layer numbers, ascending. dropped: in the order they went, with the KL after each.

    single_kl: KL(full ‖ without that layer alone) in nats a token, by layer.
    """

    kept: tuple[int, ...]
    dropped: tuple[tuple[int, float], ...]
    single_kl: tuple[float, ...]


@torch.no_grad()
def choose_layers(model: Any, batches: Sequence[Batch], keep: int) -> DepthChoice:
    """Drops one layer at a time, each time the one whose loss costs least KL to the full model.

    The first round tries every layer; later ones the SHORTLIST cheapest by their last trial.
    """
    total = len(decoder_layers(model))
    scorer = _Scorer(model, batches)
    alive = list(range(total))
    rounds = total - keep
    trials = total + max(0, rounds - 1) * SHORTLIST
    dropped: list[tuple[int, float]] = []
    with bar("Trying layers", trials, unit="layers") as advance:
        last = scorer.without_each(alive, alive, advance)
        single = tuple(last[index] for index in range(total))
        while len(alive) > keep:
            if dropped:
                shortlist = sorted(alive, key=lambda index: last[index])[:SHORTLIST]
                last.update(scorer.without_each(alive, shortlist, advance))
            else:
                shortlist = alive
            weakest = min(shortlist, key=lambda index: last[index])
            dropped.append((weakest, last[weakest]))
            alive.remove(weakest)
    return DepthChoice(tuple(alive), tuple(dropped), single)


class _Scorer:
    """Holds the calibration rows, and the full model's answer to them."""

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

        The stream before a candidate is computed once, whatever follows.
        """
        sums = dict.fromkeys(candidates, 0.0)
        counted = 0
        for number, (batch, inputs) in enumerate(self._pairs()):
            full_ND = self.full[number]
            counted += len(full_ND)
            hidden_RLD = inputs.hidden_RLD
            for place, index in enumerate(alive):
                if index in sums:
                    rows_ND = self._rows(batch, inputs, alive[place + 1 :], hidden_RLD)
                    sums[index] += summed_kl(self.head, full_ND, rows_ND)
                    if number == 0:
                        advance(1)
                hidden_RLD = run_layer(self.layers[index], hidden_RLD, inputs.extras[index])
        return {index: value / max(counted, 1) for index, value in sums.items()}

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


def summed_kl(head: LMHead, full_ND: Tensor, other_ND: Tensor) -> float:
    """Σ KL(softmax of full ‖ softmax of other) over rows, in nats, CHUNK rows at a time."""
    total = 0.0
    for full_nD, other_nD in zip(full_ND.split(CHUNK), other_ND.split(CHUNK), strict=True):
        full_nV = head_logits(head, full_nD).float().log_softmax(-1)
        other_nV = head_logits(head, other_nD).float().log_softmax(-1)
        total += (full_nV.exp() * (full_nV - other_nV)).sum().item()
    return total
