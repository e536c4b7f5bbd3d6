"""The rows of each optimizer step: rows of the data, and windows of the student's own text.

They depend only on the settings, the seed, and the prompts' lengths, so a resumed run, or a run on
a different number of processes, has the same rows. Own windows are filled with prompts before any
answer is generated, as if every answer had the maximum number of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.utils.data import Sampler

from stillhouse.training.partition import NO_ROW

MILLION = 10**6

T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """A place for one rollout.

    number: its index among all slots of the training run. prompt: the prompt's index. room: maximum
    number of tokens of the answer.
    """

    number: int
    prompt: int
    room: int


@dataclass
class StepRows:
    """The rows of each step, from step 0.

    batch: rows of a step. share: share of these that are own windows, after `cold_steps` steps with
    data alone; if share · batch is not an integer, the share is met over several steps. rows: of
    the data. lengths: tokens of each prompt. samples: consecutive rollouts of each prompt.
    max_tokens: of an answer. context: tokens of a window.
    """

    batch: int
    share: float
    cold_steps: int
    rows: int
    lengths: Sequence[int]
    samples: int
    max_tokens: int
    context: int
    seed: int
    _windows: list[int] = field(default_factory=lambda: [0])
    _data_orders: dict[int, list[int]] = field(default_factory=dict)
    _prompt_orders: dict[int, list[int]] = field(default_factory=dict)

    @property
    def millionths(self) -> int:
        """The share in millionths, as an exact integer."""
        return round(self.share * MILLION)

    def own_before(self, step: int) -> int:
        """Number of own windows in all steps before this one."""
        return max(0, step - self.cold_steps) * self.batch * self.millionths // MILLION

    def data_rows(self, step: int) -> list[int]:
        """The rows of the data in a step, in the same order as in training without own text."""
        first = step * self.batch - self.own_before(step)
        end = (step + 1) * self.batch - self.own_before(step + 1)
        return [self._data_row(number) for number in range(first, end)]

    def own_windows(self, step: int) -> list[list[Slot]]:
        """The own windows of a step, each with its slots."""
        return [
            self._filled(window)
            for window in range(self.own_before(step), self.own_before(step + 1))
        ]

    def slots(self, first_step: int, end_step: int) -> list[Slot]:
        """All slots of steps `first_step` to `end_step - 1`, in order."""
        steps = range(first_step, end_step)
        return [slot for step in steps for window in self.own_windows(step) for slot in window]

    def _data_row(self, number: int) -> int:
        epoch, place = divmod(number, self.rows)
        if epoch not in self._data_orders:
            # As in `ProcessBatches`.
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._data_orders = {epoch: torch.randperm(self.rows, generator=generator).tolist()}
        return self._data_orders[epoch][place]

    def _filled(self, window: int) -> list[Slot]:
        while len(self._windows) <= window + 1:
            first = self._windows[-1]
            self._windows.append(first + len(list(self._fill(first))))
        return list(self._fill(self._windows[window]))

    def _fill(self, number: int) -> Iterator[Slot]:
        """Yield the slots of a window whose first slot has this number."""
        left, first = self.context, number
        while True:
            prompt = self._prompt(number)
            length = self.lengths[prompt]
            room = min(self.max_tokens, self.context - length)
            if number > first and length + room > left:
                return
            yield Slot(number, prompt, room)
            left -= length + room
            number += 1

    def _prompt(self, slot: int) -> int:
        """The prompt of a slot. Each epoch has every prompt once, in an order drawn by the seed."""
        epoch, place = divmod(slot // self.samples, len(self.lengths))
        if epoch not in self._prompt_orders:
            count = len(self.lengths)
            order = random.Random(f"{self.seed} prompts {epoch}").sample(range(count), count)
            self._prompt_orders = {epoch: order}
        return self._prompt_orders[epoch][place]


@dataclass(frozen=True)
class Micro:
    """The division of a step's rows: one micro-batch of `size` rows for each process, then the next
    one for each."""

    size: int
    process: int
    processes: int

    def batches(self, rows: int) -> int:
        """The number of micro-batches of each process for this many rows."""
        return -(-rows // (self.size * self.processes))

    def part(self, rows: Sequence[T], number: int) -> Sequence[T]:
        """This process's rows in micro-batch `number`; possibly none."""
        start = (number * self.processes + self.process) * self.size
        return rows[start : start + self.size]

    def most_batches(self, plan: StepRows) -> int:
        """The maximum number of micro-batches in a step. Rows of data and own windows are in
        separate micro-batches."""
        least, more = divmod(plan.batch * plan.millionths, MILLION)
        counts = {least, least + 1} if more else {least}
        most = max(self.batches(plan.batch - own) + self.batches(own) for own in counts)
        return max(most, self.batches(plan.batch) if plan.cold_steps else 0)


class StepSampler(Sampler[list[int]]):
    """The data rows of each micro-batch of one process, for all steps. Micro-batches for own text
    have NO_ROW."""

    def __init__(self, plan: StepRows, micro: Micro, steps: int) -> None:
        self.plan, self.micro, self.steps = plan, micro, steps
        self.each = micro.most_batches(plan)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing, since all steps are in one epoch."""

    def __len__(self) -> int:
        return self.steps * self.each

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            rows = self.plan.data_rows(step)
            for number in range(self.each):
                yield [*self.micro.part(rows, number)] or [NO_ROW]
