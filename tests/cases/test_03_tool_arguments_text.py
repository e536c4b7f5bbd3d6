"""A tool call's arguments may be an object or its JSON text; the same call is learned from both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stillhouse.errors import DataError

from ..data.learned import call, learned, tool
from ..data.toys import TOOLS, TOOLS_AS_TEXT, byte_level

ARGUMENTS = {"city": "Oslo", "days": 3}
CALL = 'CALL weather {"city": "Oslo", "days": 3}<|im_end|>'


def row(arguments: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "Rain in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [call("weather", arguments)]},
        ]
    }


@pytest.mark.parametrize("template", [TOOLS, TOOLS_AS_TEXT])
@pytest.mark.parametrize(
    "arguments", [ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(json.dumps(ARGUMENTS))]
)
def test_the_call_is_learned_whatever_form_its_arguments_have(
    template: str, arguments: Any
) -> None:
    assert learned(row(arguments), byte_level(template)) == [CALL]


@pytest.mark.parametrize("arguments", [None, "", {}])
def test_a_call_without_arguments_has_an_empty_object(arguments: Any) -> None:
    assert learned(row(arguments), byte_level(TOOLS)) == ["CALL weather {}<|im_end|>"]


@pytest.mark.parametrize("arguments", ['{"city": "Os', "Oslo", "[1]", 5])
def test_arguments_that_are_not_objects_are_rejected(arguments: Any) -> None:
    with pytest.raises(DataError, match="are not a JSON object") as error:
        learned(row(arguments), byte_level(TOOLS))
    assert "messages[1].tool_calls[0]" in error.value.what


def test_openais_older_function_call_is_read_as_a_tool_call() -> None:
    messages = [
        {"role": "user", "content": "Rain in Oslo?"},
        {"role": "assistant", "content": None,
         "function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
        {"role": "function", "name": "weather", "content": "none"},
        {"role": "assistant", "content": "No rain."},
    ]  # fmt: skip
    functions = [{"name": "weather", "parameters": {"type": "object", "properties": {}}}]
    given = {"messages": messages, "functions": functions}
    assert learned(given, byte_level(TOOLS)) == [CALL, "No rain.<|im_end|>"]


@pytest.mark.parametrize("tools", [None, [tool("weather", "city")]])
def test_a_template_that_reads_both_forms_gets_the_text_unchanged(tools: Any) -> None:
    """Qwen 3's template is one: `{% if arguments is string %}`."""
    both = TOOLS.replace(
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments if c.function.arguments is string "
        "else c.function.arguments | tojson }}",
    )
    compact = {**row('{"city":"Oslo"}'), "tools": tools}
    assert learned(compact, byte_level(both)) == ['CALL weather {"city":"Oslo"}<|im_end|>']
    assert learned({**row(ARGUMENTS), "tools": tools}, byte_level(both)) == [CALL]
