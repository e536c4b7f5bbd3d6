"""Reads a chat of ChatGPT's data export (`conversations.json`): a tree of messages, of which the
branch that ends in `current_node` is the chat as it was last shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stillhouse.errors import DataError

FORMAT = "ChatGPT export"
_TEXT = "text"
_REASONING = ("thoughts", "reasoning_recap")
_BRANCHES = "only the branch of a chat that was shown last is read"
_LEFT_OUT = "reasoning, hidden messages and custom instructions are left out"
_CUT = "a chat is read up to its first turn with tools, files, images or speech"

Message = dict[str, str]


def is_chatgpt_export(row: Mapping[str, Any]) -> bool:
    mapping = row.get("mapping")
    return isinstance(mapping, Mapping) and isinstance(row.get("current_node"), str)


def chatgpt_messages(row: Mapping[str, Any], where: str) -> tuple[list[Message], tuple[str, ...]]:
    """The messages up to the last answer, and notes about what is left out; no messages if nothing
    was answered in text.

    Raises DataError for a tree that is not whole.
    """
    messages: list[Message] = []
    branch = _branch(row["mapping"], row["current_node"], where)
    notes = [_BRANCHES] if any(len(_children(node)) > 1 for node in row["mapping"].values()) else []
    for message in branch:
        role, kind, text = _role(message), _kind(message), _text(message)
        if _is_hidden(message) or kind in _REASONING or (role == "system" and not text.strip()):
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


def _branch(mapping: Mapping[str, Any], last: str, where: str) -> list[Mapping[str, Any]]:
    """The messages from the root to the last node."""
    found: list[Mapping[str, Any]] = []
    for node in _up(mapping, last, where):
        message = node.get("message")
        if isinstance(message, Mapping):
            found.append(message)
    return found[::-1]


def _up(mapping: Mapping[str, Any], last: str, where: str) -> Iterator[Mapping[str, Any]]:
    seen: set[str] = set()
    name: Any = last
    while name is not None:
        node = mapping.get(name) if isinstance(name, str) else None
        if not isinstance(node, Mapping) or name in seen:
            raise DataError(
                f"The chat's tree is not whole: there is no way from {last!r} to its first message",
                where=where,
                fix="export the data again, or remove the chat",
            )
        seen.add(name)
        yield node
        name = node.get("parent")


def _children(node: Any) -> list[Any]:
    children = node.get("children") if isinstance(node, Mapping) else None
    return children if isinstance(children, list) else []


def _role(message: Mapping[str, Any]) -> str:
    author = message.get("author")
    return str(author.get("role")) if isinstance(author, Mapping) else ""


def _kind(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return str(content.get("content_type")) if isinstance(content, Mapping) else ""


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = content.get("parts") if isinstance(content, Mapping) else None
    parts = parts if isinstance(parts, list) else []
    return "".join(part for part in parts if isinstance(part, str))


def _is_hidden(message: Mapping[str, Any]) -> bool:
    metadata = message.get("metadata")
    hidden = isinstance(metadata, Mapping) and metadata.get("is_visually_hidden_from_conversation")
    return bool(hidden) or _kind(message) == "user_editable_context"
