"""Prompts made from the documents in windows."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.data.window_prompts import window_prompts


def window(*documents: tuple[list[int], list[bool]]) -> dict[str, Tensor]:
    """A window of documents, each given as (ids, supervised)."""
    ids = [token for document, _ in documents for token in document]
    learned = [one for _, supervised in documents for one in supervised]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor([t if s else -100 for t, s in zip(ids, learned, strict=True)]),
        "position_ids": torch.tensor([p for d, _ in documents for p in range(len(d))]),
    }


def chat(first: int, *, turns: int = 1) -> tuple[list[int], list[bool]]:
    """Five tokens of a question and three of an answer, for each turn."""
    ids = list(range(first, first + 8 * turns))
    return ids, ([False] * 5 + [True] * 3) * turns


def test_the_prompt_of_a_chat_ends_before_its_last_answer() -> None:
    windows = [window(chat(10), chat(100, turns=2), ([0] * 4, [False] * 4))]
    assert window_prompts(windows, 9) == [list(range(10, 15)), list(range(100, 113))]


def test_the_prompt_of_a_text_is_its_beginning() -> None:
    def text(first: int, length: int) -> tuple[list[int], list[bool]]:
        return list(range(first, first + length)), [False, *[True] * (length - 1)]

    windows = [window(text(0, 100)), window(text(200, 20), text(300, 3))]
    assert window_prompts(windows, 9) == [list(range(32)), list(range(200, 210))]
    prefixed = list(range(100)), [False] * 3 + [True] * 97  # such as [gMASK]<sop>
    assert window_prompts([window(prefixed)], 9) == [list(range(32))]
    short = list(range(9)), [False] * 4 + [True] * 5
    assert window_prompts([window(short)], 9) == [list(range(4))], "treated as a chat"


def test_prompts_are_distinct_and_spread_over_all_windows() -> None:
    windows = [window(chat(10), chat(10)), window(chat(20)), window(chat(30)), window(chat(40))]
    assert [prompt[0] for prompt in window_prompts(windows, 9)] == [10, 20, 30, 40]
    assert [prompt[0] for prompt in window_prompts(windows, 2)] == [10, 30]
    assert window_prompts(windows, 0) == []
