"""The text of a search, taken from the training windows, and the teacher's answers to it.

Some windows are kept aside to measure candidates on, some are for short distillations, and the
rest is for calibration; no window is in two of them. The evaluation's held-out text is not touched.

Shapes: R windows of a batch, L tokens, N counted rows, D hidden width.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.windows import WindowSet
from stillhouse.errors import DataError
from stillhouse.pruning.calibrate import Batch, Some, calibration_batches, products
from stillhouse.pruning.depth import summed_kl
from stillhouse.signals import LMHead
from stillhouse.teachers.backbone import hidden_states, lm_head, trim_head


@dataclass(frozen=True)
class SearchText:
    calibration: Some
    training: Some
    heldout: Some


@dataclass(frozen=True)
class Answers:
    """What the teacher makes of some batches: its last hidden rows [N, D] a batch, and its head.

    vocabulary: rows of every head that are tokens of both models.
    """

    batches: list[Batch]
    rows: list[Tensor]
    head: LMHead
    vocabulary: int


def split_text(windows: WindowSet, heldout_tokens: int, training: int, seed: int) -> SearchText:
    """`training`: windows for short distillations; fewer are taken where the text is short.

    Raises DataError where there are not enough windows for a search.
    """
    if len(windows) < 4:
        raise DataError(
            f"{len(windows)} training windows are too few to search a shape on",
            where="data",
            fix="add sources, lower data.context, or give explicit sizes instead of a target",
        )
    length = len(windows[0]["input_ids"])
    order = random.Random(f"search {seed}").sample(range(len(windows)), len(windows))
    # At most a quarter to measure on, and a half of the rest to train on.
    first = min(-(-heldout_tokens // length), len(windows) // 4)
    second = first + min(training, (len(windows) - first) // 2)
    parts = (order[second:], order[first:second], order[:first])
    # Short distillations meet their windows in the order of the draw.
    return SearchText(*(Some(windows, part) for part in parts))


def batches_of(windows: Some, together: int, device: torch.device | str) -> list[Batch]:
    """Batches of `together` windows, in order; the last one may be smaller."""
    found = []
    for start in range(0, len(windows), together):
        part = Some(windows, range(start, min(start + together, len(windows))))
        tokens = len(part) * len(part[0]["input_ids"])
        found += calibration_batches(part, tokens, 0, device, tokens)
    return found


@torch.no_grad()
def answers(teacher: Any, batches: list[Batch], vocabulary: int, dtype: torch.dtype) -> Answers:
    """The head is the teacher's own, so that only its backbone can be let go."""
    with products(teacher, dtype):
        rows = [rows_of(teacher, batch).float() for batch in batches]
    return Answers(batches, rows, trim_head(lm_head(teacher), vocabulary), vocabulary)


def rows_of(model: Any, batch: Batch) -> Tensor:
    """The last hidden states of the counted positions, [N, D]."""
    return hidden_states(model, batch.input_ids_RL, batch.position_ids_RL)[batch.counted_RL]


@torch.no_grad()
def kl_to(known: Answers, model: Any, dtype: torch.dtype) -> float:
    """KL(teacher ‖ model) in nats a token."""
    total, count = 0.0, 0
    head = trim_head(lm_head(model), known.vocabulary)
    with products(model, dtype):
        for batch, full_ND in zip(known.batches, known.rows, strict=True):
            own_ND = rows_of(model, batch).float()
            total += summed_kl(known.head, full_ND, [own_ND], head)[0]
            count += len(full_ND)
    return total / max(count, 1)
