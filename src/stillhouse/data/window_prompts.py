"""Prompts from windows of tokens: chats without their last answer, or the beginnings of texts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stillhouse.data.shift import IGNORED
from stillhouse.data.windows import WindowSet

BEGINNING = 32
"""Tokens of a text that are a prompt; at most its first half."""
_SHORTEST = 4


def window_prompts(windows: WindowSet, count: int) -> list[list[int]]:
    """At most `count` different prompts, evenly spaced over all documents of the windows.

    A chat's prompt ends where its last supervised answer begins, so that it is what a model reads
    before it answers. A text, whose tokens are all supervised but for the tokenizer's prefix, is
    cut after its beginning.
    """
    found = list(dict.fromkeys(map(tuple, all_prompts(windows))))
    count = min(count, len(found))
    return [list(found[number * len(found) // count]) for number in range(count)]


def all_prompts(windows: WindowSet) -> Iterator[list[int]]:
    """The prompt of every document of the windows that has one, in order."""
    for window in (windows[index] for index in range(len(windows))):
        starts = (window["position_ids"] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], len(window["input_ids"])], strict=True):
            length = _prompt_length(window["labels"][start:end])
            if length >= _SHORTEST:
                yield window["input_ids"][start : start + length].tolist()


def _prompt_length(labels_L: Tensor) -> int:
    """0 if no token of the document is supervised, as in padding."""
    supervised_L = labels_L != IGNORED
    if not supervised_L.any():
        return 0
    if supervised_L[_SHORTEST - 1 :].all():  # before that: the tokenizer's prefix
        return min(BEGINNING, len(labels_L) // 2)
    begins_L = supervised_L & ~torch.nn.functional.pad(supervised_L[:-1], (1, 0))
    return int(begins_L.nonzero()[-1, 0])
