"""Reference outputs of a model on calibration text, and other models' KL to them.

Shapes: N counted rows of a batch, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.pruning.calibrate import Batch, products
from stillhouse.signals import LMHead
from stillhouse.signals.lm_head import summed_kl
from stillhouse.teachers.backbone import hidden_states, lm_head, trim_head


@dataclass(frozen=True)
class Reference:
    """A model's last hidden rows [N, D] for every batch, and its head.

    vocabulary: number of head rows that are tokens of both models; None: all.
    """

    batches: Sequence[Batch]
    rows: list[Tensor]
    head: LMHead
    vocabulary: int | None = None


def rows_of(model: Any, batch: Batch) -> Tensor:
    """The last hidden states at the counted positions, [N, D]."""
    return hidden_states(model, batch.input_ids_RL, batch.position_ids_RL)[batch.counted_RL]


@torch.no_grad()
def reference_on(
    model: Any, batches: Sequence[Batch], dtype: torch.dtype, vocabulary: int | None = None
) -> Reference:
    """Run the model over the batches. The head is the model's own, not a copy."""
    with products(model, dtype):
        rows = [rows_of(model, batch).float() for batch in batches]
    return Reference(batches, rows, trim_head(lm_head(model), vocabulary), vocabulary)


@torch.no_grad()
def mean_kl(reference: Reference, model: Any, dtype: torch.dtype) -> float:
    """KL(reference ‖ model) in nats/token."""
    total, count = 0.0, 0
    head = trim_head(lm_head(model), reference.vocabulary)
    with products(model, dtype):
        for batch, full_ND in zip(reference.batches, reference.rows, strict=True):
            own_ND = rows_of(model, batch).float()
            total += summed_kl(reference.head, full_ND, [own_ND], head)[0]
            count += len(full_ND)
    return total / max(count, 1)
