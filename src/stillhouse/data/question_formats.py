"""Reads a question and its answer, in the flat formats of instruction data, as a chat.

The formats are Alpaca's (`instruction`, `input`, `output`, and LLaMA-Factory's `system` and
`history`), Dolly's (`instruction`, `context`, `response`), question and answer, prompt and
response, and similar ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stillhouse.data.chat_formats import is_blank, read_chat, require_answer, require_text
from stillhouse.data.documents import Conversation
from stillhouse.data.reasoning import KEYS
from stillhouse.data.tool_formats import calls_in, from_json
from stillhouse.errors import DataError

_QUESTIONS = ("instruction", "prompt", "question", "query", "problem")
_CONTEXTS = ("context", "passage", "article", "document")
_MORE = ("input", *_CONTEXTS)
"""Text that belongs to the question. It follows an instruction, but a context precedes its
question."""
_ANSWERS = ("output", "response", "answer", "answers", "completion", "solution")
_BESIDE = ("system", "system_prompt", "history", "tools", "functions")
"""Keys that belong to the chat made from the question and its answer."""
_UNCLEAR = re.compile(
    r"[a-e]|(option|choice)s?_?\w?|(\w+_)?(cot|rationales?|explanations?|thoughts?|chain_of_thought"
    r"|(reasoning|thinking)_\w+|\w+_(reasoning|thinking)|trajectory"
    r"|corrected|reflections?|critiques?|revisions?|revised|distractors?_?\d*)"
)
"""Keys of choices, reasoning, and corrections, which may or may not be part of the target."""
_WRITE = "write the row as `messages`, with the question from user and the answer from assistant"


def is_pair(row: Mapping[str, Any]) -> bool:
    keys = _lower(row)
    return any(key in keys for key in (*_QUESTIONS, "input")) and any(
        key in keys for key in _ANSWERS
    )


def pair_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """The first question and answer of a row, by key; empty unless both are strings."""
    keys = _lower(row)
    question = next(key for key in (*_QUESTIONS, "input") if key in keys)
    answer = next(key for key in _ANSWERS if key in keys)
    found = {keys[key]: row[keys[key]] for key in (question, answer)}
    return found if all(isinstance(text, str) for text in found.values()) else {}


def is_question(row: Mapping[str, Any]) -> bool:
    """Whether a row has a question in two parts, such as `instruction` and `input`, with or without
    an answer."""
    keys = _lower(row)
    return any(key in keys for key in _QUESTIONS) and any(key in keys for key in _MORE)


def unread_keys(row: Mapping[str, Any], key: str) -> list[str]:
    """The keys of further text that belongs to the question under `key`, if it is a question."""
    keys = _lower(row)
    if key.lower() not in _QUESTIONS or not isinstance(row.get(key), str):
        return []
    more = {keys[name]: row[keys[name]] for name in _MORE if name in keys}
    return [name for name, text in more.items() if isinstance(text, str) and not is_blank(text)]


def read_pair(row: Mapping[str, Any]) -> tuple[Conversation, list[str]]:
    """Return the chat and the keys that were read. Raises DataError for an ambiguous row."""
    keys = _lower(row)
    named = {key: row[keys[key]] for key in _BESIDE if key in keys}
    row = {**row, **named}
    answers = [key for key in _ANSWERS if key in keys]
    if len(answers) > 1:
        raise _not_clear(answers, keys)
    text, asked = read_question(row)
    question, answer = asked[0].lower(), answers[0]
    turn = _answer(row, keys[answer])
    used = [*asked, keys[answer]]
    reasoning = next((key for key in KEYS if row.get(keys.get(key, ""))), None)
    if reasoning is not None:
        turn["reasoning_content"] = _string(row, keys[reasoning])
        used.append(keys[reasoning])
    turns = [*_history(row), {"role": "user", "content": text}, {"role": "assistant", **turn}]
    alpaca = question == "instruction" and answer == "output"
    format = "Alpaca" if alpaca else f"{question} and {answer}"
    chat = read_chat({**row, "messages": turns}, "messages", format=format)
    return chat, [*used, *(keys[key] for key in named)]


def read_question(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the question with all text that belongs to it, and the keys that were read, the
    question's first. Raises DataError for an ambiguous row."""
    keys = _lower(row)
    questions = [key for key in _QUESTIONS if key in keys]
    more = [key for key in _MORE if key in keys]
    if not questions:
        questions, more = ["input"], [key for key in more if key != "input"]
    if len(questions) == 2 and questions[1] == "query" and questions[0] != "question":
        more, questions = ["query", *more], questions[:1]  # LLaMA-Factory's own names
    if len(questions) > 1:
        raise _not_clear(questions, keys)
    unclear = [
        key for key in keys
        if _UNCLEAR.fullmatch(key) and key not in KEYS and row[keys[key]] not in ("", [])
    ]  # fmt: skip
    if unclear:
        raise DataError(f"It is not clear whether to train on {_named(unclear, keys)}", fix=_WRITE)
    question = questions[0]
    text = _string(row, keys[question])
    for key in more:
        extra = _string(row, keys[key])
        first_extra = key in _CONTEXTS and question != "instruction"
        parts = (extra, text) if first_extra else (text, extra)
        text = "\n".join(part for part in parts if part)
    return text, [keys[key] for key in (question, *more)]


def _not_clear(several: list[str], keys: Mapping[str, str]) -> DataError:
    return DataError(
        f"It is not clear what to train on: the row has {_named(several, keys)}",
        fix=f"{_WRITE}; or keep one of these keys",
    )


def _answer(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = row[key]
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = value["text"]  # SQuAD: the text of the answer and where it begins
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if not isinstance(value, str):
        found = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise DataError(
            f"`{key}` must be one string, but it is {found}",
            fix=f"write the answer to train on as a string in `{key}`",
        )
    require_answer(value, key)
    calls = calls_in(value) if row.get("tools") else None
    return {"content": value} if calls is None else {"content": None, "tool_calls": calls}


def _history(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Earlier turns, from pairs of a user and an assistant text."""
    turns = []
    history = from_json(row.get("history")) or []
    for pair in history if isinstance(history, list) else [history]:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(t, str) for t in pair)
        ):
            raise DataError(
                "`history` must be a list of pairs of strings",
                fix='write it as [["a question", "its answer"], ...]',
            )
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    return turns


def _string(row: Mapping[str, Any], key: str) -> str:
    return require_text(row[key], key, f"write `{key}` as a string; or {_WRITE}")


def _lower(row: Mapping[str, Any]) -> dict[str, str]:
    """Map lower-case names to keys, because some datasets write Question and Answer."""
    return {str(key).lower(): key for key in row}


def _named(names: list[str], keys: Mapping[str, str]) -> str:
    return " and ".join(f"`{keys[name]}`" for name in names)
