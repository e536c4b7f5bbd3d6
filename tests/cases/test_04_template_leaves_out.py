"""A row is rejected if its chat template leaves out a part of it, and the error names the part."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.errors import DataError

from ..data.learned import call, learned, rows_of, tool
from ..data.toys import CHATML, FORGETS_REASONING, KNOWN_ROLES, TOOLS, byte_level, chat

PLAIN = CHATML.replace("{{ m['content'] }}", "{{ m['content'] or '' }}")
CALLS = [
    {"role": "user", "content": "Rain in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [call("weather", {"city": "Oslo"})]},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "No rain."},
]
REASONED = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "reasoning_content": "Two and two are four.", "content": "4"},
]
DEVELOPER = [{"role": "developer", "content": "Answer in French."}, *chat("Hi", "Salut")]


@pytest.mark.parametrize(
    ("row", "template", "part"),
    [
        ({"messages": CALLS}, PLAIN, "messages[1].tool_calls[0]"),
        ({"messages": chat("Hi", "Yo"), "tools": [tool("weather")]}, PLAIN, "tools[0]` (weather)"),
        ({"messages": REASONED}, CHATML, "messages[1].reasoning_content"),
        ({"messages": DEVELOPER}, KNOWN_ROLES, "messages[0]` (developer)"),
        ({"messages": CALLS[2:]}, KNOWN_ROLES, "messages[0]` (tool)"),
        ({"messages": chat("q", "<think>why</think>a")}, CHATML.replace(
            "m['content']", "m['content'].split('</think>')[-1]"), "messages[1].content"),
        ({"messages": chat("q", "a" * 90)}, CHATML.replace(
            "m['content']", "m['content'][:50]"), "messages[1].content"),
    ],
)  # fmt: skip
def test_omitted_content_is_rejected_and_named(
    row: dict[str, Any], template: str, part: str
) -> None:
    with pytest.raises(DataError, match="leaves out") as error:
        rows_of(row, byte_level(template))
    assert part in error.value.what
    assert error.value.where == "rows.jsonl:3"
    assert error.value.fix


def test_an_omitted_call_is_rejected_even_if_its_words_occur_in_the_answer() -> None:
    messages = chat("What is 1 and 2?", "I will add a: 1 and b: 2")
    messages[1]["tool_calls"] = [call("add", {"a": 1, "b": 2})]  # type: ignore[assignment]
    with pytest.raises(DataError, match="tool_calls"):
        rows_of({"messages": messages}, byte_level(PLAIN))


def test_an_omitted_message_is_rejected_even_if_its_text_occurs_in_another() -> None:
    messages = [{"role": "developer", "content": "Hi"}, *chat("Hi", "Salut")]
    with pytest.raises(DataError, match=r"messages\[0\]` \(developer\)"):
        rows_of({"messages": messages}, byte_level(KNOWN_ROLES))


def test_calls_and_reasoning_are_learned_if_the_template_writes_them() -> None:
    row = {"messages": CALLS, "tools": [tool("weather", "city")]}
    assert learned(row, byte_level(TOOLS)) == [
        'CALL weather {"city": "Oslo"}<|im_end|>',
        "No rain.<|im_end|>",
    ]
    reads = PLAIN.replace("{{ m['content']", "{{ m.thinking or '' }} {{ m['content']")
    assert learned({"messages": REASONED}, byte_level(reads)) == [
        "Two and two are four. 4<|im_end|>"
    ]


def test_reasoning_stripped_from_earlier_turns_is_noted_and_learned_in_a_separate_row() -> None:
    row = {"messages": chat("one", "<think>so</think>first", "two", "<think>hm</think>second")}
    rows = rows_of(row, byte_level(FORGETS_REASONING))
    assert rows[0].notes == ("the chat template leaves out the reasoning of earlier turns",)
    assert learned(row, byte_level(FORGETS_REASONING)) == [
        "<think>so</think>first<|im_end|>",
        "<think>hm</think>second<|im_end|>",
    ]


def test_a_tokenizer_with_a_template_for_tools_uses_it_for_rows_with_tools() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": TOOLS}
    row = {"messages": CALLS, "tools": [tool("weather", "city")]}
    assert learned(row, tokenizer)[0] == 'CALL weather {"city": "Oslo"}<|im_end|>'
    with pytest.raises(DataError, match="tool_calls"):
        learned({"messages": CALLS}, tokenizer)
    assert learned({"messages": chat("a", "b")}, tokenizer) == ["b<|im_end|>"]
