"""Makes prompts from windows: chats without their last answer, or the beginnings of texts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stillhouse.data.shift import IGNORED
from stillhouse.data.windows import WindowSet

BEGINNING = 32
"""Number of tokens at the beginning of a text that become a prompt; at most its first half."""
_SHORTEST = 4


def window_prompts(windows: WindowSet, count: int) -> list[list[int]]:
    """Return at most `count` distinct prompts, evenly spaced over all documents of the windows.

    A chat's prompt ends where its last supervised answer begins: it is the model's input for that
    answer. A text, whose tokens are all supervised except the tokenizer's prefix, is cut after its
    beginning.
    """
    found = list(dict.fromkeys(map(tuple, all_prompts(windows))))
    count = min(count, len(found))
    return [list(found[number * len(found) // count]) for number in range(count)]


def all_prompts(windows: WindowSet) -> Iterator[list[int]]:
    """Yield the prompt of every document in the windows that has one, in order."""
    for window in (windows[index] for index in range(len(windows))):
        starts = (window["position_ids"] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], len(window["input_ids"])], strict=True):
            length = _prompt_length(window["labels"][start:end])
            if length >= _SHORTEST:
                yield window["input_ids"][start : start + length].tolist()


def _prompt_length(labels_L: Tensor) -> int:
    """The length of a document's prompt; 0 if no token is supervised, as in padding."""
    supervised_L = labels_L != IGNORED
    if not supervised_L.any():
        return 0
    if supervised_L[_SHORTEST - 1 :].all():  # before that: the tokenizer's prefix
        return min(BEGINNING, len(labels_L) // 2)
    begins_L = supervised_L & ~torch.nn.functional.pad(supervised_L[:-1], (1, 0))
    return int(begins_L.nonzero()[-1, 0])
