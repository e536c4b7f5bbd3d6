"""Split the training windows for a search.

Some windows are held out to measure candidates, some are for short distillations, and the rest are
for calibration. No window is used twice, and the evaluation's held-out text is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stillhouse.data.draw_windows import ChosenWindows, drawn_order
from stillhouse.data.windows import WindowSet
from stillhouse.errors import DataError
from stillhouse.pruning.calibrate import Batch, calibration_batches


@dataclass(frozen=True)
class SearchText:
    calibration: ChosenWindows
    training: ChosenWindows
    heldout: ChosenWindows


def split_text(windows: WindowSet, heldout_tokens: int, training: int, seed: int) -> SearchText:
    """Split the windows. training: number of windows for short distillations; fewer are used if the
    text is short.

    Raises DataError if there are not enough windows for a search.
    """
    if len(windows) < 4:
        raise DataError(
            f"a search for a shape needs at least 4 training windows, not {len(windows)}",
            where="data",
            fix="add sources, lower data.context, or set sizes instead of a target",
        )
    length = len(windows[0]["input_ids"])
    order = drawn_order(windows, f"search {seed}")
    # At most a quarter is held out, and at most half of the rest is for training.
    first = min(-(-heldout_tokens // length), len(windows) // 4)
    second = first + min(training, (len(windows) - first) // 2)
    parts = (order[second:], order[first:second], order[:first])
    # Short distillations train on their windows in the order of the draw.
    return SearchText(*(ChosenWindows(windows, part) for part in parts))


def batches_of(windows: ChosenWindows, together: int, device: torch.device | str) -> list[Batch]:
    """Batches of `together` windows, in order; the last one can be smaller."""
    found: list[Batch] = []
    for start in range(0, len(windows), together):
        part = ChosenWindows(windows, range(start, min(start + together, len(windows))))
        tokens = len(part) * len(part[0]["input_ids"])
        found += calibration_batches(part, tokens, 0, device, tokens)
    return found
