"""Reads a chat from ChatGPT's data export (`conversations.json`).

Each chat is a tree of messages; the branch that ends in `current_node` is the one last shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.data.clear_json import value_at
from stillhouse.errors import DataError

FORMAT = "ChatGPT export"
_TEXT = "text"
_HIDDEN = ("metadata", "is_visually_hidden_from_conversation")
_REASONING = ("thoughts", "reasoning_recap")
_BRANCHES = "only the branch of a chat that was shown last is read"
_LEFT_OUT = "reasoning, hidden messages, and custom instructions are left out"
_CUT = "a chat is read up to its first turn with tools, files, images, or speech"

Message = dict[str, str]


def is_chatgpt_export(row: Mapping[str, Any]) -> bool:
    mapping = row.get("mapping")
    return isinstance(mapping, Mapping) and isinstance(row.get("current_node"), str)


def chatgpt_messages(row: Mapping[str, Any]) -> tuple[list[Message], tuple[str, ...]]:
    """Return the messages up to the last answer, and notes about what is left out.

    There are no messages if nothing was answered in text. Raises DataError for a broken tree.
    """
    messages: list[Message] = []
    branch = _branch(row["mapping"], row["current_node"])
    children = [value_at(node, ("children",)) for node in row["mapping"].values()]
    notes = [_BRANCHES] if any(isinstance(c, list) and len(c) > 1 for c in children) else []
    for message in branch:
        role, text = value_at(message, ("author", "role")), _text(message)
        kind = value_at(message, ("content", "content_type"))
        hidden = kind == "user_editable_context" or value_at(message, _HIDDEN)
        if hidden or kind in _REASONING or (role == "system" and not text.strip()):
            if text.strip() or kind in _REASONING:
                notes.append(_LEFT_OUT)
            continue
        if kind != _TEXT or role not in ("system", "user", "assistant"):
            notes.append(_CUT)
            break
        if not text.strip():
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": role, "content": text})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages, tuple(dict.fromkeys(notes))


def _branch(mapping: Mapping[str, Any], last: str) -> list[Mapping[str, Any]]:
    """The messages from the root to the last node."""
    found: list[Mapping[str, Any]] = []
    seen: set[str] = set()
    name: Any = last
    while name is not None:
        node = mapping.get(name) if isinstance(name, str) else None
        if not isinstance(node, Mapping) or name in seen:
            raise DataError(
                f"The chat's tree is broken: no path leads from {last!r} to its first message",
                fix="export the data again, or remove the chat",
            )
        seen.add(name)
        if isinstance(node.get("message"), Mapping):
            found.append(node["message"])
        name = node.get("parent")
    return found[::-1]


def _text(message: Mapping[str, Any]) -> str:
    parts = value_at(message, ("content", "parts"))
    parts = parts if isinstance(parts, list) else []
    return "".join(part for part in parts if isinstance(part, str))
