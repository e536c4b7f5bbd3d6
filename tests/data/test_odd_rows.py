"""Unusual rows from other programs: JSON inside JSON, dates, texts next to answers."""

from __future__ import annotations

import datetime
import decimal
import json
from typing import Any

import pytest

from stillhouse.data.row_formats import MISSING_AS_TEXT, document_from_row
from stillhouse.errors import DataError
from stillhouse.synthesis.prompts import prompt_messages
from stillhouse.tasks.labeled_texts import answer_of

from .learned import call, learned, shown, tool
from .toys import CHATML, FORCES_REASONING, FORGETS_REASONING, TOOLS, byte_level, chat

HI = chat("Hi", "Hello")
ASKED = {"role": "user", "content": "Rain?"}


def notes(row: dict[str, Any]) -> tuple[str, ...]:
    document = document_from_row(row, "text", "rows.jsonl:3")
    assert document is not None
    return document.about.notes


def error_of(row: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as error:
        learned(row, byte_level(TOOLS))
    assert error.value.where == "rows.jsonl:3"
    return error.value


# --- JSON text -------------------------------------------------------------------------------


def test_messages_of_prompt_and_completion_may_be_json_text() -> None:
    """As in TRL's conversational format, stored as CSV."""
    row = {"prompt": json.dumps(HI[:1]), "completion": json.dumps(HI[1:])}
    expected = {"prompt": HI[:1], "completion": HI[1:]}
    assert shown(row, byte_level()) == shown(expected, byte_level())
    with pytest.raises(DataError, match="must both be"):
        document_from_row({**row, "completion": "Hello"}, "text", "rows.jsonl:3")


@pytest.mark.parametrize("text", ['{"role": "x"}', '[{"name": "x"}]', '["user"]', "[role]"])
def test_json_that_is_not_a_chat_remains_text(text: str) -> None:
    assert learned({"prompt": "List the roles.", "completion": text}, byte_level()) == [
        f"{text}<|im_end|>"
    ]
    document_from_row({"prompt": text, "completion": "x"}, "text", "rows.jsonl:3")
    assert prompt_messages({"prompt": text}, "prompt")[0]["content"] == text


TWICE = '[{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]'
DEEP = f'[{{"role": "user", "content": "a", "x": {"[" * 150}{"]" * 150}}}]'


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": TWICE}, "'content' occurs twice"),
        ({"messages": HI, "tools": '[{"name": "f", "name": "g"}]'}, "'name' occurs twice"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [
                call("rain", '{"city": "Oslo", "city": "Rome"}')]}]}, "'city' occurs twice"),
        ({"messages": json.dumps([{"role": "user", "content": "\ud83d"}, HI[1]])}, "surrogate"),
        ({"messages": DEEP}, "more than 100 levels"),
    ],
)  # fmt: skip
def test_ambiguous_or_invalid_json_text_is_rejected(row: dict[str, Any], what: str) -> None:
    assert what in error_of(row).what


@pytest.mark.parametrize("value", [datetime.date(2020, 1, 1), decimal.Decimal("1.5"), b"x"])
def test_values_that_json_cannot_represent_are_rejected(value: Any) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [call("rain", {"on": [value]})]}
    assert f"of type {type(value).__name__}" in error_of({"messages": [ASKED, turn]}).what
    tools = [{**tool("rain"), "since": value}]
    assert f"of type {type(value).__name__}" in error_of({"messages": HI, "tools": tools}).what
    told = {"messages": [{**ASKED, "at": value}, HI[1]]}
    assert learned(told, byte_level()) == ["Hello<|im_end|>"]


# --- texts and answers -----------------------------------------------------------------------


def test_the_rendered_text_of_an_alpaca_row_is_not_trained_on() -> None:
    """As in tatsu-lab/alpaca on the Hub."""
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    rendered = {**row, "text": "Below is an instruction.\n\nAdd.\n\n1 and 2\n\n### Response:\n3"}
    assert learned(rendered, byte_level()) == ["3<|im_end|>"]
    assert notes(rendered) == ("not read: `text`",)
    other = {"text": "Ann sings.", "question": "Who?", "answer": "Bob"}
    error = error_of(other)
    assert "`text`, and also `question` and `answer`" in error.what
    assert learned({"text": "Ann sings.", "question": "Who?"}, byte_level()) == [
        "Ann sings.<|im_end|>"
    ]


@pytest.mark.parametrize("label", [True, False, "True", "false", 0, 1, "1", 1.0])
def test_answers_with_a_binary_label_are_rejected_as_rated_answers(label: Any) -> None:
    """As in KTO data (also as CSV) and WikiQA."""
    for row in (
        {"prompt": "a", "completion": "b"},
        {"question": "a", "answer": "b"},
        {"messages": HI},
    ):
        assert "rated answers" in error_of({**row, "label": label}).what
        assert "rename the key" in str(error_of({**row, "label": label}).fix)
        assert learned({**row, "class": label}, byte_level())
    assert learned({"text": "a", "label": label}, byte_level()) == ["a<|im_end|>"]
    assert notes({"messages": HI, "label": "greeting"}) == ("not read: `label`",)


def test_keys_of_a_question_may_be_capitalized() -> None:
    row = {"Instruction": "a", "Output": "b", "System": "Be brief.", "History": '[["c", "d"]]'}
    expected = {"messages": [{"role": "system", "content": "Be brief."}, *chat("c", "d", "a", "b")]}
    assert shown(row, byte_level()) == shown(expected, byte_level())
    assert notes(row) == ()


def test_words_for_missing_values_in_parts_of_a_question_are_noted() -> None:
    assert MISSING_AS_TEXT in notes({"instruction": "a", "input": "nan", "output": "b"})
    assert notes({"instruction": "a", "input": "", "output": "b"}) == ()


def test_empty_questions_are_noted() -> None:
    assert notes({"instruction": "", "input": " ", "output": "b"}) == ("a message (user) is empty",)


def test_a_null_chat_does_not_hide_the_text() -> None:
    """Arrow fills in nulls if other rows are chats."""
    assert learned({"messages": None, "text": "abc"}, byte_level()) == ["abc<|im_end|>"]
    assert "must be a list of messages" in error_of({"messages": None}).what


@pytest.mark.parametrize("role", ["ai", "AI"])
def test_roles_of_langchain_and_openassistant_are_known(role: str) -> None:
    for asker in ("human", "prompter"):
        row = {"messages": [{"role": asker, "content": "Hi"}, {"role": role, "content": "Hello"}]}
        assert shown(row, byte_level()) == shown({"messages": HI}, byte_level())


@pytest.mark.parametrize(
    ("flag", "rejected"),
    [({"learn": False}, True), ({"skip": True}, True), ({"ignore": 1}, True),
     ({"learn": True}, False), ({"skip": False}, False)],
)  # fmt: skip
def test_unknown_flags_that_would_change_the_loss_are_rejected(
    flag: dict[str, Any], rejected: bool
) -> None:
    row = {"messages": [HI[0], {**HI[1], **flag}]}
    if rejected:
        assert "seems to change what is trained on" in error_of(row).what
    else:
        assert learned(row, byte_level()) == ["Hello<|im_end|>"]


def test_the_fix_for_a_null_prompt_names_both_keys() -> None:
    assert (
        error_of({"prompt": None, "completion": "b"}).fix == "write both `prompt` and `completion`"
    )


@pytest.mark.parametrize("value", [datetime.date(2020, 1, 1), {"paid": float("nan")}, [b"x"]])
def test_reference_answers_that_json_cannot_represent_are_rejected(value: Any) -> None:
    with pytest.raises(DataError, match="cannot be written as JSON") as error:
        answer_of(value, "tasks.parquet row 3")
    assert error.value.where == "tasks.parquet row 3"
    assert answer_of({"paid": 2}, "tasks.parquet row 3") == '{"paid": 2}'


@pytest.mark.parametrize("template", [FORGETS_REASONING, FORCES_REASONING, CHATML])
def test_parts_of_an_answer_are_supervised_as_one_text(template: str) -> None:
    parts = [{"type": "text", "text": "<think>so</think>"}, {"type": "text", "text": "Hello"}]
    row = {"messages": [HI[0], {"role": "assistant", "content": parts}]}
    expected = {"messages": chat("Hi", "<think>so</think>Hello")}
    assert shown(row, byte_level(template)) == shown(expected, byte_level(template))
