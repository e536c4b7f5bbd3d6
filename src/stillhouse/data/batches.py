"""Text as training needs it: rows of equal length by index, and the number of supervised tokens.

Shapes: R rows of a batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from stillhouse.data.shift import IGNORED
from stillhouse.data.windows import ARRAYS, WindowSet

Batch = dict[str, Tensor]
"""input_ids, labels and position_ids, each [R, L]; see `WindowSet` for what they mean."""


class Batches(WindowSet, Protocol):
    """Text to train on or to evaluate on; `Windows` is the usual implementation.

    context: tokens in every row. supervised_tokens: labels to predict, in all rows together.
    """

    @property
    def context(self) -> int: ...

    @property
    def supervised_tokens(self) -> int: ...


def collate(rows: Sequence[Batch]) -> Batch:
    """Stack rows into a batch: each tensor [R, L]."""
    return {name: torch.stack([row[name] for row in rows]) for name in ARRAYS}


def in_order(windows: WindowSet, tokens: int) -> Iterator[Batch]:
    """The rows in order, in batches of about `tokens` tokens, with at least one row."""
    together = max(1, tokens // len(windows[0]["labels"]))
    for start in range(0, len(windows), together):
        yield collate([windows[i] for i in range(start, min(start + together, len(windows)))])


def empty_row(windows: WindowSet) -> Batch:
    """The first row with no token to learn."""
    first = windows[0]
    return {**first, "labels": torch.full_like(first["labels"], IGNORED)}


class NoText:
    """Batches without a row, for a training on text that the student writes. context: tokens in a
    window of that."""

    supervised_tokens = 0

    def __init__(self, context: int) -> None:
        self.context = context

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int, /) -> Batch:
        """The shape of a row."""
        return {name: torch.full((self.context,), IGNORED * (name == "labels")) for name in ARRAYS}
