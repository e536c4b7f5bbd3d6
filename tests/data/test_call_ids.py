"""Ids of tool calls that a template rejects, or that a row lacks."""

from __future__ import annotations

import re
from typing import Any

import pytest

from stillhouse.data.call_ids import IDS_CHANGED
from stillhouse.data.chat_prompt import chat_ids
from stillhouse.data.chat_proof import LEFT_OUT_LATER
from stillhouse.errors import DataError

from .learned import call, learned, rows_of, shown, tool
from .toys import byte_level

# Like Mistral's template: ids of exactly nine characters, in calls and in results.
MISTRAL = (
    "{% macro nine(id) %}{% if not id is defined or id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{% endif %}{{ id }}{% endmacro %}{{ bos_token }}[TOOLS {{ tools | tojson }}]"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'tool' %}[RESULT {{ nine(m.tool_call_id) }}]{{ m.content }}[/RESULT]"
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}[CALL {{ c.function.name }} "
    "{{ nine(c.id) }} {{ c.function.arguments | tojson }}]{% endfor %}{{ eos_token }}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Like Solar's template: any id, and the name of the function with each result.
ANY_ID = (
    "{{ tools | tojson }}\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}{{ m.name }}={{ m.tool_call_id }}: {% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.id }} {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Kimi K2's template: it generates the ids of calls, and writes the row's ids in results.
NUMBERED = ANY_ID.replace(
    "CALL {{ c.id }} ", "CALL functions.{{ c.function.name }}:{{ loop.index0 }} "
)
OSLO, ROME = "call_9qZ0aXbTnLk3yWvUe5RdPm7s", "call_Pm7s9qZ0aXbTnLk3yWvUe5Rd"
ID = re.compile(r"\b[0-9A-Za-z]{9}\b")


def row(*ids: Any, results: tuple[Any, ...] | None = None, **of_results: Any) -> dict[str, Any]:
    """A chat that looks up the weather of two cities; an id of None is left out."""

    def with_id(key: str, value: Any) -> dict[str, Any]:
        return {} if value is None else {key: value}

    cities = ("Oslo", "Rome")
    calls = [
        call("weather", {"city": city}, **with_id("id", one))
        for city, one in zip(cities, ids, strict=True)
    ]
    told = [
        {"role": "tool", "content": text, **with_id("tool_call_id", one), **of_results}
        for text, one in zip(("rain", "sun"), ids if results is None else results, strict=True)
    ]
    asked = {"role": "user", "content": "Weather?"}
    answer = {"role": "assistant", "content": "Rain and sun."}
    turn = {"role": "assistant", "content": None, "tool_calls": calls}
    return {"tools": [tool("weather", "city")], "messages": [asked, turn, *told, answer]}


def mistral(one: dict[str, Any]) -> str:
    return shown(one, byte_level(MISTRAL))


def test_openai_ids_become_nine_characters_in_calls_and_results() -> None:
    text = mistral(row(OSLO, ROME))
    called, told = re.findall(r"CALL weather (\w+)", text), re.findall(r"RESULT (\w+)", text)
    assert called == told
    assert len({*called}) == 2
    assert all(ID.fullmatch(one) for one in called)
    expected = mistral(row("oslo00001", "rome00002"))
    assert text == expected.replace("oslo00001", called[0]).replace("rome00002", called[1])


def test_changed_ids_are_noted_once() -> None:
    notes = [one.notes for one in rows_of(row(OSLO, ROME), byte_level(MISTRAL))]
    assert sum(note.count(IDS_CHANGED) for note in notes) == 1
    (kept,) = rows_of(row("oslo00001", "rome00002"), byte_level(MISTRAL))
    assert IDS_CHANGED not in kept.notes


@pytest.mark.parametrize("template", [MISTRAL, ANY_ID])
def test_calls_without_ids_get_generated_ones(template: str) -> None:
    """As in ShareGPT's and ms-swift's rows."""
    text = shown(row(None, None), byte_level(template))
    found = re.findall(r"CALL (?:weather )?([0-9A-Za-z]{9})", text)
    told = re.findall(r"(?:RESULT |weather=)([0-9A-Za-z]{9})", text)
    assert len({*found}) == 2
    assert found == told
    assert rows_of(row(None, None), byte_level(template))[0].notes == (IDS_CHANGED,)


def test_generated_ids_depend_only_on_the_row() -> None:
    assert mistral(row(OSLO, ROME)) == mistral(row(OSLO, ROME))
    assert mistral(row(None, None)) == mistral(row(None, None))
    assert mistral(row(OSLO, ROME)) != mistral(row(OSLO, OSLO + "x"))


def test_results_in_another_order_keep_the_ids_of_their_calls() -> None:
    text = mistral(row(OSLO, ROME, results=(ROME, OSLO)))
    called, told = re.findall(r"CALL weather (\w+)", text), re.findall(r"RESULT (\w+)", text)
    assert called == told[::-1]


@pytest.mark.parametrize("ids", [("call_1", "call_2"), (1, 2), ("toolong_id", "a-b-c-d-e")])
def test_ids_of_any_length_type_and_characters_are_replaced(ids: tuple[Any, Any]) -> None:
    first, last = learned(row(*ids), byte_level(MISTRAL))
    assert len(ID.findall(first)) == 2
    assert last.startswith("Rain and sun.")


def test_templates_that_accept_any_id_get_the_ids_of_the_row() -> None:
    (made,) = rows_of(row(OSLO, ROME), byte_level(ANY_ID))
    text = shown(row(OSLO, ROME), byte_level(ANY_ID))
    assert text.count(OSLO) == text.count(ROME) == 2
    assert made.notes == ()


def test_results_get_the_ids_that_the_template_generates_for_calls() -> None:
    (made,) = rows_of(row(OSLO, ROME, results=(ROME, OSLO)), byte_level(NUMBERED))
    text = shown(row(OSLO, ROME, results=(ROME, OSLO)), byte_level(NUMBERED))
    assert "weather=functions.weather:1: rain" in text
    assert "weather=functions.weather:0: sun" in text
    assert made.notes == (IDS_CHANGED,)


def test_a_result_without_a_name_gets_that_of_its_function() -> None:
    """OpenAI's results have no name."""
    text = shown(row(OSLO, ROME), byte_level(ANY_ID))
    assert f"weather={OSLO}: rain" in text
    named = shown(row(OSLO, ROME, name="forecast"), byte_level(ANY_ID))
    assert f"forecast={OSLO}: rain" in named


def test_a_template_without_ids_gets_the_name_of_the_function_but_no_ids() -> None:
    template = ANY_ID.replace("={{ m.tool_call_id }}", "").replace(
        "{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}", "{{ c | tojson }}"
    )
    text = shown(row(None, None), byte_level(template))
    assert "weather: rain" in text
    assert '"id"' not in text


def test_results_without_a_call_still_get_distinct_ids() -> None:
    alone = row(OSLO, ROME)
    del alone["messages"][1]
    text = mistral(alone)
    assert len({*re.findall(r"RESULT (\w{9})\]", text)}) == 2


# Like Mistral's template: the system prompt is written into the last message if it is a user's.
SYSTEM_LAST = MISTRAL.replace(
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]",
    "{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }} [/INST]{% elif m.role == 'system' %}",
)


def test_a_system_prompt_that_is_left_out_after_the_results_is_noted() -> None:
    """Each turn is supervised after the prompt that the template renders for that turn."""
    chat = row("oslo00001", "rome00002")
    chat["messages"].insert(0, {"role": "system", "content": "Be kind."})
    call_row, answer_row = rows_of(chat, byte_level(SYSTEM_LAST))
    assert call_row.notes == (LEFT_OUT_LATER.format(role="system"),)
    assert answer_row.notes == ()
    text = shown(chat, byte_level(SYSTEM_LAST))
    assert "[INST] Be kind. Weather? [/INST][[[CALL weather oslo00001" in text
    assert "[INST] Weather? [/INST][CALL weather oslo00001" in text


def test_a_system_prompt_that_no_supervised_row_contains_is_rejected() -> None:
    chat = row("oslo00001", "rome00002")
    chat["messages"].insert(0, {"role": "system", "content": "Be kind."})
    chat["messages"][2]["weight"] = 0
    with pytest.raises(DataError, match=r"leaves out `messages\[0\]` \(system\)"):
        rows_of(chat, byte_level(SYSTEM_LAST))


def test_prompts_are_rendered_like_training_text() -> None:
    chat, words = row(OSLO, ROME), byte_level(MISTRAL.replace("[TOOLS {{ tools | tojson }}]", ""))
    del chat["tools"]
    prompt = words.decode(chat_ids(words, chat["messages"][:-1]))
    whole = shown(chat, words).replace("[[", "").replace("]]", "")
    assert whole.startswith(prompt)
