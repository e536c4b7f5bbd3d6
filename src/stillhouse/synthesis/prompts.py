"""Prompts from a file.

Rows can be logs of earlier chats, which end with an answer: everything after the user's last turn
is dropped, because the teacher generates it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.data.row_reader import header_hint, not_empty, read_rows
from stillhouse.errors import DataError
from stillhouse.generation.chat_frame import user_turn
from stillhouse.generation.request import Message
from stillhouse.synthesis.prompts_config import PromptFormat

_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
_LOG_PLACES = (
    ("messages",),  # chat data, and lines of OpenAI's fine-tuning and stored-completions exports
    ("request", "messages"),  # gateways that log the request beside the response
    ("request", "body", "messages"),
    ("body", "messages"),  # the input of OpenAI's batch API
    ("messages", "data"),  # a stored completion with the listing of its messages inside
    ("input_messages",),
    ("input",),
)
"""Where logs keep the messages that were sent to a model."""


@dataclass(frozen=True)
class Prompt:
    """messages: up to the user's last turn. where: file and line."""

    messages: tuple[Message, ...]
    where: str


def read_prompts(
    path: Path, *, format: PromptFormat = "auto", key: str = "prompt", limit: int | None = None
) -> Iterator[Prompt]:
    """The prompts of a file, one at a time.

    A row has a string or messages under `key`; where that is `prompt`, it may also be a chat or its
    log (see `_LOG_PLACES`). Each line of plain text is a prompt. auto: by the file's extension.
    Raises DataError with the line for a row that is not a prompt.
    """
    rows = read_rows(path, format=None if format == "auto" else format, text_key=key)
    for row, where in not_empty(itertools.islice(rows, limit), "The file of prompts", path):
        yield Prompt(prompt_messages(row, key, where), where)


# --- one row ---------------------------------------------------------------------------------


def prompt_messages(row: Mapping[str, Any], key: str, where: str) -> tuple[Message, ...]:
    """The chat in a row, up to the user's last turn. Raises DataError."""
    found = row.get(key)
    if found is None and key == "prompt":
        places = (at(row, place) for place in _LOG_PLACES)
        found = next((value for value in places if isinstance(value, list)), None)
    if isinstance(found, str):
        return _user(found, where)
    if isinstance(found, list):
        return _chat(found, where)
    raise DataError(
        f"the row has no `{key}`{' and no `messages`' * (key == 'prompt')}; its keys are "
        f"{', '.join(map(str, row))}",
        where=where,
        fix=f"{header_hint(row)}name the key of the prompt: synthesize.prompts.key",
    )


def _user(text: str, where: str) -> tuple[Message, ...]:
    if not text.strip():
        raise DataError("the prompt is empty", where=where, fix="remove the row")
    return user_turn(text)


def at(row: Any, place: tuple[str, ...]) -> Any:
    """The value under nested keys; None if there is none."""
    for key in place:
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def _chat(messages: list[Any], where: str) -> tuple[Message, ...]:
    """The known keys of each message, up to the last turn of the user (or a tool)."""
    kept: list[dict[str, Any]] = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                "a message has no role",
                where=where,
                fix='write each message as {"role": "user", "content": "..."}',
            )
        known = {k: message[k] for k in _MESSAGE_KEYS if message.get(k) is not None}
        if "content" not in known and message.get("content_parts"):
            known["content"] = message["content_parts"]
        kept.append(known)
    while kept and kept[-1]["role"] not in ("user", "tool"):
        kept.pop()
    if not any(message["role"] == "user" for message in kept):
        raise DataError("the chat has no turn of the user", where=where, fix="remove the row")
    return tuple(kept)
