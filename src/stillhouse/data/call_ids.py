"""Ids of tool calls as a chat template accepts them, the same in a call and its result.

OpenAI's ids are `call_` and 24 characters, and the rows of ShareGPT and ms-swift have none. The
templates of Mistral accept only 9 letters or digits; that of Kimi K2 writes the name of the
function and the number of the call.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

IdForm = Literal["any", "short", "numbered"]
"""short: 9 letters or digits. numbered: `functions.NAME:N`, the N-th call of its message."""
SHORT = 9
"""Length of the ids that Mistral's templates accept, and of those that are added."""
_ALPHABET = string.digits + string.ascii_letters

IDS_CHANGED = (
    "ids of tool calls are missing, or not of the form that the chat template has: they are "
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
    """The messages with an id in every tool call, and the same one in its result.

    form: ids of another form are replaced. names: results get the name of the
    function that was called, if they have none. A result without an id belongs to the first call
    of its name, or else to the first call, that has no result yet.
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
    """The result with the id of its call, which is removed from those without a result."""
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
    """The id of each call and each result; None if it has none."""
    for message in messages:
        yield from (call.get("id") for call in message.get("tool_calls") or ())
        if message["role"] == "tool":
            yield message.get("tool_call_id")


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and len(value) == SHORT and set(value) <= set(_ALPHABET)


def _short_id(source: Any) -> str:
    """9 letters and digits that depend only on the source."""
    text = json.dumps(source, sort_keys=True, default=str)
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
    made = ""
    for _ in range(SHORT):
        number, digit = divmod(number, len(_ALPHABET))
        made += _ALPHABET[digit]
    return made
