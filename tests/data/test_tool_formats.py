"""Tools and tool calls in the formats of other training libraries."""

from __future__ import annotations

import json

from stillhouse.data.chat_proof import TOOLS_SHORTENED

from .learned import call, learned, rows_of, shown, tool
from .toys import CHATML, TOOLS, byte_level

QUESTION = {"role": "user", "content": "Rain?"}
ANSWER = {"role": "assistant", "content": "No."}
RAIN = tool("weather", "city")
# Like gpt-oss's and Mistral's templates: it reads a tool's fields under `function`.
WRAPPED = (
    "{% for t in tools %}TOOL {{ t.function.name }} {{ t.function.description }}\n{% endfor %}"
    + CHATML
)


def called(city: str) -> dict[str, str]:
    return {
        "role": "tool_call",
        "content": json.dumps({"name": "weather", "arguments": {"city": city}}),
    }


def test_calls_in_separate_messages_become_one_turn() -> None:
    results = [{"role": "tool_response", "content": text} for text in ("none", "much")]
    says = {"role": "assistant", "content": "Let me see."}
    row = {
        "tools": [tool("weather", "city")],
        "messages": [QUESTION, says, called("Oslo"), called("Rome"), *results, ANSWER],
    }
    calls = [call("weather", {"city": city}) for city in ("Oslo", "Rome")]
    turn = {**says, "tool_calls": calls}
    assert shown(row, byte_level(TOOLS)) == shown(
        {**row, "messages": [QUESTION, turn, *results, ANSWER]}, byte_level(TOOLS)
    )


def test_an_unsupervised_call_stays_a_separate_turn() -> None:
    row = {
        "tools": [tool("weather", "city")],
        "messages": [QUESTION, called("Oslo"), {**called("Rome"), "loss": False}, ANSWER],
    }
    first, last = learned(row, byte_level(TOOLS))
    assert "Oslo" in first
    assert last == "No.<|im_end|>"
    assert "Rome" in shown(row, byte_level(TOOLS))


def test_bare_functions_are_wrapped_if_the_template_needs_it() -> None:
    """LLaMA-Factory and xLAM write functions without `{"type": "function", "function": ...}`."""
    bare = {**tool("weather", "city")["function"], "description": "Is it wet?"}
    row = {"messages": [QUESTION, ANSWER], "tools": json.dumps([bare])}
    assert shown(row, byte_level(WRAPPED)).startswith("TOOL weather Is it wet?\n<|im_start|>user")
    as_written = shown(row, byte_level(TOOLS)).partition("\n")[0]
    assert json.loads(as_written.removeprefix("TOOLS ")) == [bare]


def test_flat_calls_are_rendered_by_templates_of_either_form() -> None:
    """Some data sets write calls flat: `{"name": ..., "arguments": ...}`."""
    flat = {"name": "weather", "arguments": {"city": "Oslo"}}
    wrapped = {"type": "function", "function": flat}
    bare = TOOLS.replace("c.function.", "c.")
    for arguments in (flat["arguments"], json.dumps(flat["arguments"])):
        rows = [
            {"messages": [QUESTION, {"role": "assistant", "tool_calls": [one]}], "tools": [RAIN]}
            for one in ({**flat, "arguments": arguments}, wrapped)
        ]
        assert shown(rows[0], byte_level(TOOLS)) == shown(rows[1], byte_level(TOOLS))
        assert "CALL weather" in shown(rows[0], byte_level(TOOLS))
        assert "CALL weather" in shown(rows[0], byte_level(bare))


def test_parameters_without_a_schema_that_a_template_leaves_out_are_noted() -> None:
    """xLAM's parameters map names to types directly, so that templates find no `properties`."""
    bare = {"name": "weather", "description": "Is it wet?", "parameters": {"city": {"type": "str"}}}
    row = {"messages": [QUESTION, ANSWER], "tools": [bare]}
    (shortened,) = rows_of(row, byte_level(WRAPPED))
    (whole,) = rows_of(row, byte_level(TOOLS))
    assert TOOLS_SHORTENED in shortened.notes
    assert TOOLS_SHORTENED not in whole.notes
