"""An empty answer is rejected in every format, because a student would learn to say nothing."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.errors import DataError

from ..data.learned import call, learned, rows_of
from ..data.toys import TOOLS, byte_level, chat

EMPTY = ["", "  \n", "\u200b", "\ufeff \t"]
FORMATS: dict[str, Any] = {
    "messages": lambda text: {"messages": chat("Name a fruit.", text)},
    "an earlier turn": lambda text: {"messages": chat("a", text, "b", "c")},
    "parts": lambda text: {"messages": [*chat("a"), {"role": "assistant", "content": [
        {"type": "text", "text": text}]}]},
    "completion": lambda text: {"prompt": "Name a fruit.", "completion": text},
    "messages of a completion": lambda text: {
        "prompt": chat("a"), "completion": chat("a", text)[1:]},
    "ShareGPT": lambda text: {"conversations": [
        {"from": "human", "value": "a"}, {"from": "gpt", "value": text}]},
    "Alpaca": lambda text: {"instruction": "Name a fruit.", "input": "", "output": text},
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", EMPTY)
def test_an_empty_answer_is_rejected(format: str, text: str) -> None:
    with pytest.raises(DataError, match="nothing to train on") as error:
        rows_of(FORMATS[format](text), byte_level())
    assert error.value.where == "rows.jsonl:3"


def test_an_empty_turn_with_tool_calls_is_not_empty() -> None:
    messages = [*chat("Rain?"), {"role": "assistant", "content": "", "tool_calls": [
        call("weather", {})]}]  # fmt: skip
    assert learned({"messages": messages}, byte_level(TOOLS)) == ["CALL weather {}<|im_end|>"]


def test_an_empty_turn_of_weight_0_is_context() -> None:
    messages: list[dict[str, Any]] = chat("a", "", "b", "c")
    messages[1]["weight"] = 0
    assert learned({"messages": messages}, byte_level()) == ["c<|im_end|>"]
