"""Partition of rows over processes: every row once per epoch, for any number of processes.

An optimizer step takes the next `micro x accumulation x processes` rows in the epoch's order: one
micro-batch for each process, then the next one for each. If there are too few rows for the last
step, its last micro-batches are smaller or empty; no row is repeated to fill them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from stillhouse.data.batches import Batch, without_labels
from stillhouse.data.windows import WindowSet

NO_ROW = -1
"""Index of a row without supervised tokens, for micro-batches that would otherwise be empty."""


class ProcessBatches(Sampler[list[int]]):
    """Row indices of each micro-batch of one process, for `DataLoader(batch_sampler=...)`.

    rows: number of rows in the data. micro: rows in one micro-batch. seed: for the order, which
    differs between epochs and is the same on all processes.
    Every process gets the same number of micro-batches in each optimizer step, as collectives
    require.
    """

    def __init__(self, rows: int, micro: int, *, process: int, processes: int, seed: int) -> None:
        self.rows, self.micro, self.seed = rows, micro, seed
        self.process, self.processes = process, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // (self.micro * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        # The same order as accelerate's SeedableRandomSampler.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        together = self.micro * self.processes
        for start in range(self.process * self.micro, len(self) * together, together):
            yield order[start : start + self.micro] or [NO_ROW]


class WithEmptyRow(Dataset[Batch]):
    """The rows of `windows`, and a row without supervised tokens at NO_ROW."""

    def __init__(self, windows: WindowSet) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return self.windows[index] if index != NO_ROW else without_labels(self.windows[0])


class _EpochLoader(DataLoader[Any]):
    """A loader that sets the epoch of its batch sampler, as transformers.Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        rows: Any = self.batch_sampler
        rows.set_epoch(epoch)


def row_loader(
    rows: Sampler[list[int]], dataset: Any, args: TrainingArguments, collate: Any
) -> DataLoader[Any]:
    """Create a loader for the micro-batches of a sampler with epochs.

    dataset: rows by index, with a row without supervised tokens at NO_ROW.
    """
    return _EpochLoader(
        dataset,
        batch_sampler=rows,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
