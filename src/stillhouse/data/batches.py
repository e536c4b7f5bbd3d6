"""Text as training needs it: rows of equal length by index, and the number of supervised tokens.

Shapes: R rows of a batch, L tokens, N supervised tokens, S documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from stillhouse.data.shift import IGNORED, supervised_positions, supervised_targets
from stillhouse.data.windows import ARRAYS, WindowSet

Batch = dict[str, Tensor]
"""input_ids, labels and position_ids, each [R, L]; see `WindowSet` for what they mean. `collate`
adds what depends on values, so that no device has to be waited for: positions and targets, [N]
each, and documents, [S + 1]. Read them with `positions_of`, `targets_of` and `documents_of`."""
POSITIONS, TARGETS, DOCUMENTS = "positions", "targets", "documents"


class Batches(WindowSet, Protocol):
    """Text to train on or to evaluate on; `Windows` is the usual implementation.

    context: tokens in every row. supervised_tokens: labels to predict, in all rows together.
    """

    @property
    def context(self) -> int: ...

    @property
    def supervised_tokens(self) -> int: ...


def collate(rows: Sequence[Batch]) -> Batch:
    """Stack rows into a batch: each tensor [R, L], and what follows from the labels."""
    return completed({name: torch.stack([row[name] for row in rows]) for name in ARRAYS})


def join(batches: Sequence[Batch]) -> Batch:
    """One batch with the rows of all, in order."""
    return completed({name: torch.cat([batch[name] for batch in batches]) for name in ARRAYS})


def completed(arrays: Batch) -> Batch:
    """The arrays of `ARRAYS`, and what follows from them."""
    documents = {DOCUMENTS: document_bounds(arrays["position_ids"])}
    return with_labels(arrays | documents, arrays["labels"])


def with_labels(batch: Batch, labels_RL: Tensor) -> Batch:
    """The batch with these labels, and the positions and targets that follow from them."""
    found = {POSITIONS: supervised_positions(labels_RL), TARGETS: supervised_targets(labels_RL)}
    return {**batch, "labels": labels_RL, **found}


def positions_of(batch: Batch) -> Tensor:
    """`supervised_positions` of the batch: its own if it was collated here."""
    found = batch.get(POSITIONS)
    return supervised_positions(batch["labels"]) if found is None else found


def targets_of(batch: Batch) -> Tensor:
    """`supervised_targets` of the batch: its own if it was collated here."""
    found = batch.get(TARGETS)
    return supervised_targets(batch["labels"]) if found is None else found


def documents_of(batch: Batch) -> Tensor | None:
    """`document_bounds` of the batch, if it was collated here."""
    return batch.get(DOCUMENTS)


def document_bounds(position_ids_RL: Tensor) -> Tensor:
    """Where each document begins, counted over all windows, and the number of tokens: [S + 1].

    As in transformers, a document begins where a position does not follow the one before.
    They are 32-bit integers, as flash attention needs.
    """
    begins_RL = position_ids_RL.diff(dim=1, prepend=position_ids_RL[:, :1]) != 1
    begins_RL[:, 0] = True
    starts_S = begins_RL.flatten().nonzero()[:, 0]
    return nn.functional.pad(starts_S, (0, 1), value=begins_RL.numel()).int()


def in_order(windows: WindowSet, tokens: int) -> Iterator[Batch]:
    """The rows in order, in batches of about `tokens` tokens, with at least one row."""
    return map(collate, rows_in_order(windows, tokens))


def rows_in_order(windows: WindowSet, tokens: int) -> Iterator[Sequence[Batch]]:
    """The rows of each batch of `in_order`."""
    together = max(1, tokens // len(windows[0]["labels"]))
    for start in range(0, len(windows), together):
        yield [windows[i] for i in range(start, min(start + together, len(windows)))]


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


def own_share(
    batches: Iterable[Sequence[Batch]], process: int, processes: int
) -> Iterator[Sequence[Batch]]:
    """Every n-th batch of rows, for n processes.

    Each process gets equally many, as collectives need: if there is none left for it, a row
    without a token to learn.
    """
    remaining = iter(batches)
    while together := list(islice(remaining, processes)):
        missing = [without_labels(together[0][0])]
        yield together[process] if process < len(together) else missing


def without_labels(row: Batch) -> Batch:
    """The row with no token to learn."""
    return {**row, "labels": torch.full_like(row["labels"], IGNORED)}
