"""Reads a chat in any common format as messages with `role` and `content`.

The formats are OpenAI's fine-tuning format, including its older function calls; Hugging Face's; and
ShareGPT's, with `from` and `value`. The keys that other trainers use to mask turns are read too.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from stillhouse.data.documents import About, Conversation
from stillhouse.data.loss_flags import (
    LEARNED,
    MASKED,
    OF_MESSAGE,
    reject_suspects,
    reject_weighted_row,
    take_weights,
)
from stillhouse.data.tool_formats import (
    calls_in,
    decode_calls,
    from_json,
    has_nulls,
    read_tools,
    without_nulls,
)
from stillhouse.errors import DataError

_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "chatbot", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response"), "tool"),
    "function-response": "tool",
}
_CALLS = ("function_call", "function-call", "tool_call")
"""Roles of ShareGPT turns that are tool calls written as JSON."""
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")

_WRITE_PART = 'remove the row, or write every part as {"type": "text", "text": "..."}'
_FIX_OF_PART = {
    "tool_use": "write it as a call in the message's `tool_calls`: "
    '{"id": "...", "type": "function", "function": {"name": "...", "arguments": {...}}}',
    "tool_result": "write it as a separate message: "
    '{"role": "tool", "tool_call_id": "...", "content": "..."}',
    "thinking": "write it as the message's `reasoning_content`",
}
"""What to do with the parts of Anthropic's messages."""
TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")

_WRITE = 'write it as [{"role": "user", "content": "..."}, ...]'
_WRITE_MESSAGE = 'write each message as {"role": "user", "content": "..."}'
_RENDERING = ("documents", "chat_template_kwargs")
"""Keys of a row that other trainers pass to the chat template."""
_NO_NULLS = "null fields of tool calls and tools are left out (Arrow fills them in)"


def read_chat(
    row: Mapping[str, Any], key: str, *, completion: str | None = None, format: str = "messages"
) -> Conversation:
    """Read the chat under `key` of a row, with `system` and `tools` if the row has them.

    completion: the key of the messages that follow, whose turns alone are supervised; None: all
    assistant turns are. format: the name of the row's format. Raises DataError if the value is not
    a chat, or if its keys ask for supervision that is not possible.
    """
    reject_media(row)
    reject_weighted_row(row)
    _reject_rendering(row)
    found = _messages(row[key], key)
    before = 0
    if completion is not None:
        before = len(found)
        found += _messages(row[completion], completion)
        if found[before - 1]["role"] == found[before]["role"] == "assistant":
            raise DataError(
                f"`{key}` ends with an assistant message and `{completion}` begins with one: it is "
                "not clear whether they are a single turn",
                fix=f"write the complete answer as one message of `{completion}`; or, if they are "
                f"two turns, use `messages` with `weight`: 0 in the first",
            )
    if add_system(found, row):
        before += before > 0
    others = sorted({m["role"] for m in found} - set(_KNOWN_ROLES))
    context_only = take_weights(found, key)
    tools = read_tools(row)
    calls = [message.get("tool_calls") for message in found]
    notes = [_NO_NULLS] if has_nulls([calls, tools]) else []
    for message in found:
        if "tool_calls" in message:
            message["tool_calls"] = without_nulls(message["tool_calls"])
    notes += [f"turns of the role {role!r} are context only" for role in others]
    return Conversation(
        tuple(found),
        before,
        tuple(without_nulls(tools)) if tools else None,
        context_only=context_only,
        about=About(format, tuple(notes)),
    )


def _reject_rendering(row: Mapping[str, Any]) -> None:
    for key in _RENDERING:
        value = from_json(row.get(key))
        if isinstance(value, (list, Mapping)) and value:
            raise DataError(
                f"The row has `{key}`, which would change the rendered chat but is not supported",
                fix=f"move its content into the messages, and remove `{key}`",
            )


def reject_media(row: Mapping[str, Any]) -> None:
    for key in _MEDIA:
        if row.get(key):
            raise DataError(
                f"The row has `{key}`, but only text is supported",
                fix=f"remove the row, or remove `{key}` if the text makes sense without it",
            )


def system_prompt(row: Mapping[str, Any]) -> str:
    """The row's own system prompt; "" if it has none."""
    for key in ("system", "system_prompt"):
        value = row.get(key)
        if isinstance(value, list):
            value = "".join(text_parts(value, f"`{key}`"))
        if value is not None and require_text(value, key, "write the system prompt as a string"):
            return str(value)
    return ""


def add_system(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> bool:
    """Put the row's system prompt before its messages if they have none; return whether it did.

    Raises DataError if the messages have a different system prompt.
    """
    system = system_prompt(row)
    own = [message.get("content") for message in messages if message["role"] == "system"]
    if system and own and own != [system]:
        raise DataError(
            "The row has a system prompt, and its messages have a different one",
            fix="keep one of them",
        )
    if not system or own:
        return False
    messages.insert(0, {"role": "system", "content": system})
    return True


def require_text(value: Any, key: str, fix: str) -> str:
    """Return the value. Raises DataError if it is not a string."""
    if isinstance(value, str):
        return value
    found = f"of type {type(value).__name__}"
    if value is None or (isinstance(value, float) and value != value):
        found = "null" if value is None else "NaN"
    raise DataError(f"`{key}` must be a string, but it is {found}", fix=fix)


def require_answer(text: str, key: str) -> str:
    """Return the text to train on. Raises DataError if it is blank."""
    if is_blank(text):
        raise DataError(
            f"`{key}` is empty: there is nothing to train on in this row",
            fix=f"remove the row, or fill its `{key}`",
        )
    return text


def is_blank(text: str) -> bool:
    """Whether a text has no visible characters: only whitespace, control and format characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


# --- messages --------------------------------------------------------------------------------


def chat_or_text(value: Any) -> Any:
    """Like `as_messages`, but JSON text that is not a list of messages stays text."""
    if not isinstance(value, str):
        return as_messages(value)
    if not re.match(r'[\s"]*[\[{].*\b(role|from)\b', value, re.DOTALL):
        return value
    found = as_messages(value)
    if isinstance(found, list) and all(
        isinstance(one, Mapping) and ("role" in one or "from" in one) for one in found
    ):
        return found
    return value


def as_messages(value: Any) -> Any:
    """Decode a list of messages from JSON text, or from Hugging Face's `Sequence` of a dictionary
    (one list per key). Anything else is returned unchanged. Raises DataError for ambiguous JSON.
    """
    value = from_json(value)
    if not isinstance(value, Mapping) or not all(isinstance(v, list) for v in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def _messages(value: Any, key: str) -> list[dict[str, Any]]:
    value = as_messages(value)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*'", value):
            raise DataError(
                f"`{key}` is a list printed by Python, but it must be JSON",
                fix="write it with json.dumps",
            )
        raise DataError(f"`{key}` must be a list of messages, but it is {found}", fix=_WRITE)
    made = [_message(message, f"{key}[{index}]") for index, message in enumerate(value)]
    return _with_calls_joined(value, made)


def _with_calls_joined(written: list[Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join tool calls that are separate messages with the assistant message before them.

    ms-swift writes each call of a turn as a message with the role `tool_call`. Messages with
    different loss flags are not joined.
    """
    joined: list[dict[str, Any]] = []
    for one, made in zip(written, messages, strict=True):
        last = joined[-1] if joined else {}
        called = last.get("role") == "assistant" and str(one.get("role")).lower() in _CALLS
        if called and all(last.get(key) == made.get(key) for key in (*LEARNED, *MASKED)):
            last["tool_calls"] = [*last.get("tool_calls", ()), *made["tool_calls"]]
        else:
            joined.append(made)
    return joined


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(
            f"`{name}` must be an object with role and content, but it is {type(message).__name__}",
            fix=_WRITE_MESSAGE,
        )
    made = with_known_role(message, name)
    decode_calls(made, name)
    _check_content(made, message, name)
    return made


def with_known_role(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the message with `role` and `content`, without nulls, and with a standard role."""
    # `content` may be null with tool calls, and is an error otherwise: keep it.
    made = {k: v for k, v in message.items() if v is not None or k == "content"}
    if "content" not in made and isinstance(made.get("value"), str) and "role" in made:
        made["content"] = made.pop("value")  # Pygmalion's
    if "from" in made and "role" not in made:
        made = _from_sharegpt(made, name)
    elif str(made.get("role")).lower() in _CALLS and isinstance(made.get("content"), str):
        made = _from_sharegpt({**made, "from": made["role"], "value": made["content"]}, name)
    if not isinstance(made.get("role"), str):
        if "role" in made:
            raise DataError(
                f"`{name}.role` must be a string, but it is {made['role']!r}", fix=_WRITE_MESSAGE
            )
        nearest = difflib.get_close_matches("role", list(map(str, message)), 1)
        hint = f" (did you mean `{nearest[0]}`?)" if nearest else ""
        keys = ", ".join(map(str, message)) or "none"
        raise DataError(f"`{name}` has no `role`; its keys are {keys}{hint}", fix=_WRITE_MESSAGE)
    role = made["role"].strip()
    lower = role.lower()  # Cohere's files have System, User and Chatbot
    made["role"] = _ROLES.get(lower, lower if lower in _KNOWN_ROLES else role)
    return made


def _from_sharegpt(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Convert `from` and `value` to role and content, and a call in JSON to a tool call."""
    sender = str(message["from"]).strip().lower()
    role = _ROLES.get(sender, sender)
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    value = message.get("value", message.get("content"))
    if sender in _CALLS:
        calls = calls_in(value)
        if calls is None:
            raise DataError(
                f"`{name}` is from {sender}, but its value is not a JSON object with `name` and "
                "`arguments`",
                fix='write the value as {"name": "...", "arguments": {...}}, or a list of these',
            )
        return {**rest, "role": "assistant", "content": "", "tool_calls": calls}
    if role not in _KNOWN_ROLES:
        known = ", ".join((*_KNOWN_ROLES, *_ROLES, *_CALLS[:1]))
        raise DataError(f"`{name}` is from {sender!r}, an unknown role", fix=f"use {known}")
    return {**rest, "role": role, "content": value}


def _check_content(message: dict[str, Any], written: Mapping[str, Any], name: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if isinstance(content, list) and content:
        texts = text_parts(content, f"`{name}`")
        message["content"] = [without_nulls(part) for part in content]
        if message["role"] == "assistant":  # its reasoning is found in one text
            message["content"] = "".join(texts)
        return
    if not content and message.get("tool_calls") and not isinstance(content, Mapping):
        message["content"] = None
        return
    fix = _WRITE_MESSAGE
    if "content" not in written and "value" not in written:
        problem = f"has no `content`; its keys are {', '.join(map(str, written))}"
    else:
        found = "null" if content is None else f"of type {type(content).__name__}"
        problem = f"has a `content` that must be a string, but it is {found}"
    if message.get("refusal"):
        problem, fix = "has its text in `refusal`", "write the refusal's text as `content`"
    raise DataError(f"`{name}` {problem}", fix=fix)


def text_parts(parts: list[Any], owner: str) -> list[str]:
    """Return the text of each part of a content. Raises DataError for a part that is not text."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise DataError(
                f"{owner} has a part that is not text: {kind}",
                fix=_FIX_OF_PART.get(str(kind), _WRITE_PART),
            )
        reject_suspects(part, OF_MESSAGE, f"A part of {owner}")
        texts.append(text)
    return texts


def joined_text(content: Any) -> str:
    """The text of a message's content."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
