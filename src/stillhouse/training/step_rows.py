"""Which rows are in each optimizer step: rows of the data, and windows of own text.

All of it follows from the settings, the seed, and the lengths of prompts: a resumed run, and one on
other processes, has the same rows. Own windows are filled with prompts before any answer is
written, as if every answer had its maximum of tokens.
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
    """A place for one rollout. number: among all of the training. prompt: its index. room: tokens
    that the answer may have."""

    number: int
    prompt: int
    room: int


@dataclass
class StepRows:
    """The rows of each step, from step 0.

    batch: rows of a step. share: of them, own windows, after `cold_steps` steps of data alone. If
    share · batch is not an integer, it holds for the sum over steps. rows: of the data.
    lengths: tokens of each prompt. samples: rollouts of each prompt, one after the other.
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
        """The share, exactly."""
        return round(self.share * MILLION)

    def own_before(self, step: int) -> int:
        """Own windows in all steps before this one."""
        return max(0, step - self.cold_steps) * self.batch * self.millionths // MILLION

    def data_rows(self, step: int) -> list[int]:
        """The rows of the data in a step, in the order in which a training without own text meets
        them."""
        first = step * self.batch - self.own_before(step)
        end = (step + 1) * self.batch - self.own_before(step + 1)
        return [self._data_row(number) for number in range(first, end)]

    def own_windows(self, step: int) -> list[list[Slot]]:
        """The own windows of a step, each with the rollouts that it has."""
        return [
            self._filled(window)
            for window in range(self.own_before(step), self.own_before(step + 1))
        ]

    def slots(self, first_step: int, end_step: int) -> list[Slot]:
        """All slots of the steps from the first up to the end, in order."""
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
        """The slots of a window whose first one has this number."""
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
        """Every prompt once before any is there again, in an order drawn by the seed."""
        epoch, place = divmod(slot // self.samples, len(self.lengths))
        if epoch not in self._prompt_orders:
            count = len(self.lengths)
            order = random.Random(f"{self.seed} prompts {epoch}").sample(range(count), count)
            self._prompt_orders = {epoch: order}
        return self._prompt_orders[epoch][place]


@dataclass(frozen=True)
class Micro:
    """How rows of a step are divided: one micro-batch of `size` rows for each process, then the
    next."""

    size: int
    process: int
    processes: int

    def batches(self, rows: int) -> int:
        """Micro-batches of each process for a number of rows."""
        return -(-rows // (self.size * self.processes))

    def part(self, rows: Sequence[T], number: int) -> Sequence[T]:
        """This process's rows of its micro-batch of that number; there may be none."""
        start = (number * self.processes + self.process) * self.size
        return rows[start : start + self.size]

    def most_batches(self, plan: StepRows) -> int:
        """The most micro-batches of any step: rows of data and own windows are in separate ones."""
        least, more = divmod(plan.batch * plan.millionths, MILLION)
        counts = {least, least + 1} if more else {least}
        most = max(self.batches(plan.batch - own) + self.batches(own) for own in counts)
        return max(most, self.batches(plan.batch) if plan.cold_steps else 0)


class StepSampler(Sampler[list[int]]):
    """The data rows of each micro-batch of one process, for all steps; where a step's micro-batch
    has own text, `NO_ROW`."""

    def __init__(self, plan: StepRows, micro: Micro, steps: int) -> None:
        self.plan, self.micro, self.steps = plan, micro, steps
        self.each = micro.most_batches(plan)

    def set_epoch(self, epoch: int) -> None:
        """All steps are in one epoch."""

    def __len__(self) -> int:
        return self.steps * self.each

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            rows = self.plan.data_rows(step)
            for number in range(self.each):
                yield [*self.micro.part(rows, number)] or [NO_ROW]
