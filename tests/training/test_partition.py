"""Every row occurs once per epoch, for any number of processes and any micro-batch size."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.data.batches import own_share, rows_in_order
from stillhouse.training.partition import NO_ROW, ProcessBatches


def batches(rows: int, micro: int, processes: int, epoch: int = 0) -> list[list[list[int]]]:
    """The micro-batches of each process."""
    found = []
    for process in range(processes):
        each = ProcessBatches(rows, micro, process=process, processes=processes, seed=7)
        each.set_epoch(epoch)
        assert len(each) == len(list(each))
        found.append(list(each))
    return found


def rows_of(found: list[list[list[int]]], steps: slice) -> list[int]:
    """The rows in some micro-batches of all processes, sorted."""
    return sorted(row for side in found for each in side[steps] for row in each if row != NO_ROW)


SIZES = {
    "rows": st.integers(1, 70),
    "micro": st.integers(1, 5),
    "processes": st.integers(1, 9),
    "epoch": st.integers(0, 3),
}


@settings(max_examples=300, deadline=None)
@given(**SIZES)
def test_every_row_occurs_once_per_epoch(rows: int, micro: int, processes: int, epoch: int) -> None:
    """This includes an incomplete last micro-batch, and more processes than rows."""
    found = batches(rows, micro, processes, epoch)
    assert rows_of(found, slice(None)) == list(range(rows))
    assert len({len(side) for side in found}) == 1
    assert all(each for side in found for each in side)  # a forward pass needs a row


@settings(max_examples=300, deadline=None)
@given(**SIZES, accumulation=st.integers(1, 4))
def test_each_step_has_the_rows_that_one_process_would_take(
    rows: int, micro: int, processes: int, epoch: int, accumulation: int
) -> None:
    (alone,) = batches(rows, micro * processes * accumulation, 1, epoch)
    found = batches(rows, micro, processes, epoch)
    for step, expected in enumerate(alone):
        part = slice(step * accumulation, (step + 1) * accumulation)
        assert rows_of(found, part) == sorted(expected)


def test_the_order_is_that_of_accelerates_sampler() -> None:
    for epoch in range(3):
        sampler = SeedableRandomSampler(range(23), generator=torch.Generator(), data_seed=7)
        sampler.set_epoch(epoch)
        (alone,) = batches(23, 23, 1, epoch)
        assert alone == [list(sampler)]


class Rows:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([index]), "labels": torch.tensor([index])}


def test_each_process_has_as_many_held_out_batches_and_every_row_counts_once() -> None:
    sides = [list(own_share(rows_in_order(Rows(), 2), each, 2)) for each in range(2)]
    assert [len(side) for side in sides] == [2, 2]
    labels = [int(row["labels"]) for side in sides for batch in side for row in batch]
    assert sorted(label for label in labels if label != -100) == [0, 1, 2, 3, 4]
