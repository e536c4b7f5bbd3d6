"""Common row formats are recognized; advice to set a key never drops half of a row."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from stillhouse.data.row_formats import document_from_row
from stillhouse.data.tokenize_rows import tokenize
from stillhouse.errors import DataError
from tests import tiny

# format: (row, parts of the prompt, the answer)
ROWS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "Alpaca": (
        {"instruction": "Name a fruit that is red.", "input": "", "output": "Apple"},
        ["Name a fruit that is red."],
        "Apple",
    ),
    "Alpaca with an input": (
        {"instruction": "Translate.", "input": "Hund", "output": "dog"},
        ["Translate.", "Hund"],
        "dog",
    ),
    "question and answer": (
        {"question": "What is the capital of Norway?", "answer": "Oslo"},
        ["What is the capital of Norway?"],
        "Oslo",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        ["hi"],
        "hello",
    ),
    "prompt and response": ({"prompt": "Say p.", "response": "r"}, ["Say p."], "r"),
    "Dolly": (
        {"instruction": "Who?", "context": "Ann won.", "response": "Ann", "category": "qa"},
        ["Who?", "Ann won."],
        "Ann",
    ),
}


def rendered(row: dict[str, Any], text_key: str = "text") -> tuple[str, str]:
    """The complete text of a row, and the part of it that is learned."""
    words = tiny.tokenizer()
    document = document_from_row(row, text_key, "row")
    assert document is not None
    ids: list[int] = []
    learned: list[int] = []
    for made in next(iter(tokenize([document], words))):
        ids += made.ids.tolist()
        learned += made.ids[made.supervised].tolist()
    return words.decode(ids), words.decode(learned)


@pytest.mark.parametrize("form", ROWS)
def test_common_formats_are_recognized_and_only_their_answers_are_learned(form: str) -> None:
    row, asked, answer = ROWS[form]
    whole, learned = rendered(row)
    assert all(part in whole for part in asked)
    assert answer in learned
    assert not any(part in learned for part in asked)


def test_a_request_without_an_answer_is_rejected() -> None:
    row = {
        "custom_id": "1",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "hi"}]},
    }
    with pytest.raises(DataError) as caught:
        document_from_row(row, "text", "row")
    assert "text_key" not in str(caught.value.fix)
    assert "messages" in str(caught.value.fix)


def test_a_key_is_suggested_only_if_it_holds_all_text() -> None:
    row: dict[str, Any] = {"id": 7, "body": "All that this row says."}
    with pytest.raises(DataError) as caught:
        document_from_row(row, "text", "row")
    advised = re.search(r"text_key: (\w+)", str(caught.value.fix))
    assert advised is not None
    whole, learned = rendered(row, advised[1])
    assert row["body"] in whole
    assert row["body"] in learned


def test_the_message_suggests_choosing_a_key_if_several_hold_text() -> None:
    row = {"headline": "Snow in May", "article": "It snowed for a whole day, people say."}
    with pytest.raises(DataError) as caught:
        document_from_row(row, "text", "row")
    fix = str(caught.value.fix)
    assert fix.index("`messages`") < fix.index("text_key")
    pair = {"prompt": row["headline"], "completion": row["article"]}
    assert row["article"] in rendered(pair)[1]


def test_a_misspelled_key_is_named_and_renaming_it_works() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with pytest.raises(DataError) as caught:
        document_from_row({"mesages": chat}, "text", "row")
    old, new = re.findall(r"`(\w+)`", str(caught.value.fix))
    assert "hello" in rendered(json.loads(json.dumps({"mesages": chat}).replace(old, new)))[1]
