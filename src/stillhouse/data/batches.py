"""Batches of training text: rows of equal length, and the number of supervised tokens.

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
"""input_ids, labels, and position_ids, each [R, L]; see `WindowSet` for their meaning. `collate`
adds positions and targets, [N] each, and documents, [S + 1]. Their shapes depend on values, so
computing them on the host avoids a device sync. Read them with `positions_of`, `targets_of`, and
`documents_of`."""
POSITIONS, TARGETS, DOCUMENTS = "positions", "targets", "documents"


class Batches(WindowSet, Protocol):
    """Text to train or evaluate on; `Windows` is the usual implementation.

    context: tokens in every row. supervised_tokens: number of labels to predict, over all rows.
    """

    @property
    def context(self) -> int: ...

    @property
    def supervised_tokens(self) -> int: ...


def collate(rows: Sequence[Batch]) -> Batch:
    """Stack rows into a batch: each tensor [R, L], and the tensors derived from them."""
    return completed({name: torch.stack([row[name] for row in rows]) for name in ARRAYS})


def join(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches into one, in order."""
    return completed({name: torch.cat([batch[name] for batch in batches]) for name in ARRAYS})


def completed(arrays: Batch) -> Batch:
    """Add the derived tensors to a batch that has only `ARRAYS`."""
    documents = {DOCUMENTS: document_bounds(arrays["position_ids"])}
    return with_labels(arrays | documents, arrays["labels"])


def with_labels(batch: Batch, labels_RL: Tensor) -> Batch:
    """Return the batch with these labels, and with positions and targets that match them."""
    found = {POSITIONS: supervised_positions(labels_RL), TARGETS: supervised_targets(labels_RL)}
    return {**batch, "labels": labels_RL, **found}


def positions_of(batch: Batch) -> Tensor:
    """`supervised_positions` of the batch, precomputed if it comes from `collate`."""
    found = batch.get(POSITIONS)
    return supervised_positions(batch["labels"]) if found is None else found


def targets_of(batch: Batch) -> Tensor:
    """`supervised_targets` of the batch, precomputed if it comes from `collate`."""
    found = batch.get(TARGETS)
    return supervised_targets(batch["labels"]) if found is None else found


def documents_of(batch: Batch) -> Tensor | None:
    """`document_bounds` of the batch; None if it does not come from `collate`."""
    return batch.get(DOCUMENTS)


def document_bounds(position_ids_RL: Tensor) -> Tensor:
    """Start of each document, counted over all windows, then the total number of tokens: [S + 1].

    As in transformers, a document begins where a position does not follow the previous one.
    The result is int32, as flash attention requires.
    """
    begins_RL = position_ids_RL.diff(dim=1, prepend=position_ids_RL[:, :1]) != 1
    begins_RL[:, 0] = True
    starts_S = begins_RL.flatten().nonzero()[:, 0]
    return nn.functional.pad(starts_S, (0, 1), value=begins_RL.numel()).int()


def in_order(windows: WindowSet, tokens: int) -> Iterator[Batch]:
    """Yield the rows in order, in batches of about `tokens` tokens and at least one row."""
    return map(collate, rows_in_order(windows, tokens))


def rows_in_order(windows: WindowSet, tokens: int) -> Iterator[Sequence[Batch]]:
    """Yield the rows of each batch of `in_order`, not collated."""
    together = max(1, tokens // len(windows[0]["labels"]))
    for start in range(0, len(windows), together):
        yield [windows[i] for i in range(start, min(start + together, len(windows)))]


class NoText:
    """Batches with no rows, for training only on text that the student generates.

    context: tokens in a window of that text.
    """

    supervised_tokens = 0

    def __init__(self, context: int) -> None:
        self.context = context

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int, /) -> Batch:
        """A placeholder row: it has the shape of a row, and no labels."""
        return {name: torch.full((self.context,), IGNORED * (name == "labels")) for name in ARRAYS}


def own_share(
    batches: Iterable[Sequence[Batch]], process: int, processes: int
) -> Iterator[Sequence[Batch]]:
    """Yield every n-th batch of rows, for n processes.

    Every process gets the same number of batches, as collectives require. A process for which no
    batch is left gets a row without labels.
    """
    remaining = iter(batches)
    while together := list(islice(remaining, processes)):
        missing = [without_labels(together[0][0])]
        yield together[process] if process < len(together) else missing


def without_labels(row: Batch) -> Batch:
    """Return the row with every label ignored."""
    return {**row, "labels": torch.full_like(row["labels"], IGNORED)}
