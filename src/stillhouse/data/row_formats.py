"""Makes a document of a row of a file or dataset, or rejects it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from stillhouse.data.documents import AnyDocument, Completion, Conversation, Document
from stillhouse.errors import DataError


def document_from_row(row: Mapping[str, Any], text_key: str, where: str) -> AnyDocument | None:
    """The document in `row`, or None if its text is blank.

    Looks for `messages`, then `prompt` with `completion`, then `text_key`; a `text_key` other than
    "text" was set by the user, so it comes first. Raises DataError if there is none of them.
    """
    if text_key != "text" and text_key in row:
        return _plain(row, text_key, where)
    if "messages" in row:
        messages = _messages(row["messages"], "messages", where)
        return Conversation(messages, tools=_tools(row, where), where=where)
    if "prompt" in row and "completion" in row:
        return _completion(row, where)
    if text_key in row:
        return _plain(row, text_key, where)
    raise _missing_key(row, text_key, where)


def _plain(row: Mapping[str, Any], key: str, where: str) -> Document | None:
    text = _text(row[key], key, where)
    return Document(text, where) if text.strip() else None


def _completion(row: Mapping[str, Any], where: str) -> AnyDocument | None:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, "prompt", where)
        after = _messages(completion, "completion", where)
        return Conversation(before + after, len(before), _tools(row, where), where)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError(
            "`prompt` and `completion` must both be strings, or both be lists of messages",
            where=where,
            fix='write both as lists: [{"role": "user", "content": "..."}]',
        )
    prompt = _text(prompt, "prompt", where)
    completion = _text(completion, "completion", where)
    if not completion.strip():
        raise DataError(
            "`completion` is empty: there is nothing to train on in this row",
            where=where,
            fix="remove the row, or fill its completion",
        )
    return Completion(prompt, completion, where)


def _text(value: Any, key: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        found = "null"
    elif isinstance(value, float) and value != value:
        found = "NaN"
    else:
        found = f"of type {type(value).__name__}"
    raise DataError(
        f"`{key}` must be a string, but it is {found}",
        where=where,
        fix=f"remove the row, write its `{key}` as a string, or name another column in text_key",
    )


def _messages(value: Any, key: str, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise DataError(
            f"`{key}` must be a list of messages, but it is {found}",
            where=where,
            fix='write it as [{"role": "user", "content": "..."}, ...]',
        )
    for index, message in enumerate(value):
        problem = _message_problem(message)
        if problem:
            raise DataError(
                f"`{key}[{index}]` {problem}",
                where=where,
                fix='write each message as {"role": "user", "content": "..."}',
            )
    return tuple(value)


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f"must be an object with role and content, but it is {type(message).__name__}"
    if not isinstance(message.get("role"), str):
        nearest = difflib.get_close_matches("role", list(message), 1)
        hint = f" (did you mean `{nearest[0]}`?)" if nearest and nearest[0] != "role" else ""
        return f"has no `role`; its keys are {', '.join(message) or 'none'}{hint}"
    content = message.get("content")
    if isinstance(content, str) or (isinstance(content, list) and content):
        return None
    if content is None and message.get("tool_calls"):
        return None
    if "content" not in message:
        return f"has no `content`; its keys are {', '.join(message)}"
    found = "null" if content is None else f"of type {type(content).__name__}"
    return f"has a `content` that must be a string, but it is {found}"


def _tools(row: Mapping[str, Any], where: str) -> tuple[Any, ...] | None:
    tools = row.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(
            f"`tools` must be a list of JSON schemas, but it is {type(tools).__name__}",
            where=where,
            fix="write the tools as a JSON list, or remove the key",
        )
    return tuple(tools)


def _missing_key(row: Mapping[str, Any], text_key: str, where: str) -> DataError:
    keys = [str(key) for key in row]
    wanted = dict.fromkeys([text_key, "messages", "prompt", "completion"])
    near = [
        match for want in wanted if want not in row
        for match in difflib.get_close_matches(want, keys, 1)
    ]  # fmt: skip
    has = f"its keys are {', '.join(keys)}" if keys else "it is empty"
    if near:
        fix = f"set text_key: {near[0]}, or rename the key"
    elif "prompt" in row or "completion" in row:
        fix = "give both `prompt` and `completion`"
    elif keys:
        fix = f"set text_key to the key of the text, e.g. text_key: {_texty(row)}"
    else:
        fix = "remove the row"
    return DataError(
        f"The row has no `{text_key}`, no `messages` and no `prompt` with `completion`; {has}",
        where=where,
        fix=fix,
    )


def _texty(row: Mapping[str, Any]) -> str:
    """The key with the longest string: most likely the text."""
    return max(row, key=lambda key: len(row[key]) if isinstance(row[key], str) else -1)
