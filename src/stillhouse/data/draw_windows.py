"""Windows in a random order determined by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stillhouse.data.shift import supervised_targets
from stillhouse.data.windows import WindowSet


@dataclass(frozen=True)
class ChosenWindows:
    """A subset of windows, selected by number."""

    windows: WindowSet
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        return self.windows[self.numbers[index]]


def drawn_order(windows: WindowSet, seed: int | str) -> list[int]:
    """The numbers of all windows in random order.

    Include a text in the seed to get a separate order for each purpose. The order always differs
    from the order of training, which torch draws.
    """
    return random.Random(seed).sample(range(len(windows)), len(windows))


def draw_windows(
    windows: WindowSet, tokens: int, seed: int, *, most: int | None = None
) -> tuple[list[dict[str, Tensor]], int]:
    """Draw windows until they have `tokens` supervised tokens; return them and their number of
    supervised tokens. Windows without supervised tokens are skipped.

    most: only so many tokens of a window count; None: all of them.
    """
    drawn, found = [], 0
    for number in drawn_order(windows, seed):
        window = windows[number]
        supervised = len(supervised_targets(window["labels"][None]))
        if supervised:
            drawn.append(window)
            found += supervised if most is None else min(supervised, most)
        if found >= tokens:
            break
    return drawn, found
