"""Rewrites ids of tool calls to the form that a chat template accepts.

An OpenAI id is `call_` followed by 24 characters; ShareGPT and ms-swift rows have no ids. Mistral's
templates accept only ids of 9 letters or digits, and Kimi K2's template writes the function's name
and the number of the call.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

IdForm = Literal["any", "short", "numbered"]
"""short: 9 letters or digits. numbered: `functions.NAME:N` for the N-th call of a message."""
SHORT = 9
"""Length of the ids that Mistral's templates accept, and of the ids added here."""
_ALPHABET = string.digits + string.ascii_letters

IDS_CHANGED = (
    "tool call ids are missing, or in a form that the chat template does not accept; they are "
    "replaced"
)


@dataclass
class _Call:
    given: Any
    id: str
    name: str


def with_call_ids(
    messages: Sequence[dict[str, Any]], *, form: IdForm, names: bool
) -> list[dict[str, Any]]:
    """Give every tool call an id, and its result the same id.

    form: replace ids in any other form. names: add the called function's name to results that
    have none. A result without an id belongs to the first call with its name that has no result
    yet, or else to the first call without a result.
    """
    open_calls: list[_Call] = []
    fitted = []
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            calls, made = message["tool_calls"], []
            for number, call in enumerate(calls):
                given, name = call.get("id"), call.get("function", call)["name"]
                missing = given is None or given == ""
                new = given
                if form == "numbered":
                    new = f"functions.{name}:{number}"
                elif missing or (form == "short" and not _is_short(given)):
                    new = _short_id([index, number, call] if missing else given)
                open_calls.append(_Call(given, new, name))
                made.append({**call, "id": new})
            message = {**message, "tool_calls": made}
        elif message["role"] == "tool":
            message = _answered(message, open_calls, form, names)
        fitted.append(message)
    return fitted


def _answered(
    message: dict[str, Any], open_calls: list[_Call], form: IdForm, names: bool
) -> dict[str, Any]:
    """Give a result the id of its call, and remove that call from `open_calls`."""
    given, name = message.get("tool_call_id"), message.get("name")
    if given is None or given == "":
        fitting = [call for call in open_calls if call.name == name] or open_calls
    else:
        fitting = [call for call in open_calls if call.given == given]
    if fitting:
        call = fitting[0]
        open_calls.remove(call)
        found = {"name": call.name} if names and not name else {}
        return {**message, **found, "tool_call_id": call.id}
    if given and form == "short" and not _is_short(given):
        return {**message, "tool_call_id": _short_id(given)}
    return message


def written_ids(messages: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield the id of each call and each result; None for one without an id."""
    for message in messages:
        yield from (call.get("id") for call in message.get("tool_calls") or ())
        if message["role"] == "tool":
            yield message.get("tool_call_id")


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and len(value) == SHORT and set(value) <= set(_ALPHABET)


def _short_id(source: Any) -> str:
    """An id of 9 letters and digits that depends only on the source."""
    text = json.dumps(source, sort_keys=True, default=str)
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
    made = ""
    for _ in range(SHORT):
        number, digit = divmod(number, len(_ALPHABET))
        made += _ALPHABET[digit]
    return made
