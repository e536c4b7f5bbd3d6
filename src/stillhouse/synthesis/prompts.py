"""Reads prompts from a file.

Rows can be logs of earlier chats that end with an answer. Everything after the last user turn is
dropped, because the teacher generates it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.data.chat_formats import (
    add_system,
    as_messages,
    chat_or_text,
    reject_media,
    text_parts,
    with_known_role,
)
from stillhouse.data.clear_json import value_at
from stillhouse.data.loss_flags import LEARNED
from stillhouse.data.question_formats import is_pair, is_question, read_question, unread_keys
from stillhouse.data.row_reader import header_hint, not_empty, read_rows
from stillhouse.data.tool_formats import read_tools
from stillhouse.errors import DataError, errors_at
from stillhouse.generation.chat_frame import user_turn
from stillhouse.generation.request import Message
from stillhouse.synthesis.synthesize_config import PromptFormat

KEY = "synthesize.prompts.key"
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
_LOG_PLACES = (
    ("conversations",),  # ShareGPT
    ("conversation",),
    ("messages",),  # chat data, and lines of OpenAI's fine-tuning and stored-completions exports
    ("request", "messages"),  # gateways that log the request next to the response
    ("request", "body", "messages"),
    ("body", "messages"),  # the input of OpenAI's batch API
    ("messages", "data"),  # a stored completion with the listing of its messages inside
    ("input_messages",),
    ("input",),
)
"""Where logs store the messages that were sent to a model."""


@dataclass(frozen=True)
class Prompt:
    """A prompt. messages: up to the last user turn. where: file and line."""

    messages: tuple[Message, ...]
    where: str


def read_prompts(
    path: Path,
    *,
    format: PromptFormat = "auto",
    key: str = "prompt",
    limit: int | None = None,
    setting: str = KEY,
    learned: bool = True,
) -> Iterator[Prompt]:
    """Yield the prompts of a file.

    A row has a string or messages under `key`. If `key` is `prompt`, a row may also be a chat, its
    log (see `_LOG_PLACES`), a question with its answer, or a question in two parts. In plain text,
    each line is a prompt. format: auto decides by the file's extension. setting, learned: see
    `prompt_messages`. Raises DataError with the line for a row that is not a prompt or has tools or
    media, which are not sent.
    """
    rows = read_rows(path, format=None if format == "auto" else format, text_key=key)
    for row, where in not_empty(itertools.islice(rows, limit), "The file of prompts", path):
        yield read_prompt(row, key, where, setting=setting, learned=learned)


def read_prompt(
    row: Mapping[str, Any], key: str, where: str, *, setting: str = KEY, learned: bool = True
) -> Prompt:
    """Read a row as `read_prompts` does."""
    with errors_at(where):
        messages = prompt_messages(row, key, setting=setting, learned=learned)
        _reject_unsent(row, messages)
    return Prompt(messages, where)


FIRST_ROWS = 100


def unread_notes(path: Path, *, format: PromptFormat = "auto", key: str = "prompt") -> list[str]:
    """A note if, in the first rows, a part of the question is not under `key`."""
    rows = read_rows(path, format=None if format == "auto" else format, text_key=key)
    for row, where in itertools.islice(rows, FIRST_ROWS):
        unread = unread_keys(row, key)
        if unread:
            return [
                f"only `{key}` is sent, without {' and '.join(f'`{one}`' for one in unread)} "
                f"({where})"
            ]
    return []


# --- one row ---------------------------------------------------------------------------------


def prompt_messages(
    row: Mapping[str, Any],
    key: str,
    *,
    setting: str | None = None,
    learned: bool = False,
) -> tuple[Message, ...]:
    """Read the chat in a row, up to the last user turn.

    setting: the recipe key whose value is `key`; None if there is none. learned: whether a student
    is trained on the assistant turns of the prompt, so that they must not be context only. Raises
    DataError.
    """
    found, holder = chat_or_text(row.get(key)), row
    if found is None and key == "prompt":
        found, holder = _logged(row)
        given = {name: value for name, value in row.items() if value is not None}
        if found is None and (is_pair(given) or is_question(given)):
            found = read_question(given)[0]
    if isinstance(found, str):
        if not found.strip():
            raise DataError("the prompt is empty", fix="remove the row")
        messages = [dict(message) for message in user_turn(found)]
    elif isinstance(found, list):
        messages = _chat(found, learned=learned)
    else:
        also = " and no `messages`" if key == "prompt" else ""
        fix = f"{header_hint(row)}write the question as `prompt` or `messages`"
        if setting is not None:
            fix += f"; or, if a different key contains all of it, set {setting} to that key"
        raise DataError(
            f"the row has no `{key}`{also}; its keys are {', '.join(map(str, row))}", fix=fix
        )
    add_system(messages, holder)
    return tuple(messages)


def _logged(row: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The messages of a chat or its log, and the object that contains them."""
    for place in _LOG_PLACES:
        value = as_messages(value_at(row, place))
        if isinstance(value, list):
            return value, value_at(row, place[:-1])
    return None, row


def _reject_unsent(row: Mapping[str, Any], messages: Iterable[Message]) -> None:
    """Raise DataError for parts of a prompt that would not be sent."""
    for place in ((), ("request",), ("request", "body"), ("body",)):
        holder = value_at(row, place)
        if not isinstance(holder, Mapping):
            continue
        reject_media(holder)
        if read_tools(holder):
            raise DataError(
                "The row has `tools`, which are not sent with a prompt",
                fix="describe them in the system message, and remove `tools`",
            )
    for number, message in enumerate(messages):
        if isinstance(message.get("content"), list):
            text_parts(message["content"], f"message {number}")


def _chat(messages: list[Any], *, learned: bool) -> list[dict[str, Any]]:
    """Keep the known keys of each message, up to the last turn of the user or a tool."""
    kept: list[dict[str, Any]] = []
    not_learned: list[bool] = []
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            raise DataError(
                "a message has no role",
                fix='write each message as {"role": "user", "content": "..."}',
            )
        message = with_known_role(message, f"message {len(kept)}")
        known = {k: message[k] for k in _MESSAGE_KEYS if message.get(k) is not None}
        if "content" not in known and message.get("content_parts"):
            known["content"] = message["content_parts"]
        kept.append(known)
        flags = [message[key] for key in LEARNED if message.get(key) is not None]
        masked = message.get("masked") or not all(flags)
        not_learned.append(known["role"] == "assistant" and bool(masked))
    while kept and kept[-1]["role"] not in ("user", "tool"):
        kept.pop()
    if learned and any(not_learned[: len(kept)]):
        raise DataError(
            f"message {not_learned.index(True)} is an assistant turn that must not be trained on "
            "(`weight`: 0), but training uses every assistant turn of a synthesized chat",
            fix="remove the key to train on the turn too, or remove the turn from the prompt",
        )
    if not any(message["role"] == "user" for message in kept):
        raise DataError("the chat has no user turn", fix="remove the row")
    return kept
