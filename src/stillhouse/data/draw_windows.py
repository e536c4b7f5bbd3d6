"""Windows in an order drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stillhouse.data.shift import supervised_targets
from stillhouse.data.windows import WindowSet


@dataclass(frozen=True)
class ChosenWindows:
    """Some windows of a set, by their numbers."""

    windows: WindowSet
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        return self.windows[self.numbers[index]]


def drawn_order(windows: WindowSet, seed: int | str) -> list[int]:
    """The numbers of all windows. A purpose with its own text in the seed has its own order; none
    of them is torch's with the same seed, in which training meets the windows."""
    return random.Random(seed).sample(range(len(windows)), len(windows))


def draw_windows(windows: WindowSet, tokens: int, seed: int) -> tuple[list[dict[str, Tensor]], int]:
    """Windows with supervised tokens in drawn order, until there are `tokens` of them; and how many
    there are."""
    drawn, found = [], 0
    for number in drawn_order(windows, seed):
        window = windows[number]
        supervised = len(supervised_targets(window["labels"][None]))
        if supervised:
            drawn.append(window)
            found += supervised
        if found >= tokens:
            break
    return drawn, found
