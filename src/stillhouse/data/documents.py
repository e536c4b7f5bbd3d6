"""The three kinds of documents, and the hashes that identify their content.

`where` (file:line, or corpus:topic) is for error messages only: documents with the same content are
equal regardless of where they were read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stillhouse.data.clear_json import half_a_pair
from stillhouse.data.words import collapsed

Message = Mapping[str, Any]
"""One turn of a chat: `role` and `content`, and other keys that the chat template uses."""


@dataclass(frozen=True)
class About:
    """How a row was read. format: the name of its format. notes: the parts that are not supervised
    or not read, one sentence each."""

    format: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """Plain text: every token but the first is supervised."""

    text: str
    where: str = field(default="", compare=False)
    about: About = field(default=About("text"), compare=False)

    def content(self) -> Any:
        return {"text": self.text}


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion, as plain strings: only the completion is supervised."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False)
    about: About = field(default=About("prompt and completion"), compare=False)

    def content(self) -> Any:
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Conversation:
    """A chat. Assistant turns in `messages[supervised_from:]` are supervised, except those whose
    indices are in `context_only` (weight 0)."""

    messages: tuple[Message, ...]
    supervised_from: int = 0
    tools: tuple[Any, ...] | None = None
    where: str = field(default="", compare=False)
    context_only: frozenset[int] = frozenset()
    about: About = field(default=About("messages"), compare=False)

    def content(self) -> Any:
        messages = [{k: v for k, v in turn.items() if v is not None} for turn in self.messages]
        content = {"messages": messages, "from": self.supervised_from, "tools": self.tools}
        return content | ({"context_only": sorted(self.context_only)} if self.context_only else {})


AnyDocument = Document | Completion | Conversation


def row_size(document: AnyDocument) -> int:
    """Approximate number of characters in the row that the document was read from."""
    return len(document.text) if isinstance(document, Document) else len(str(document))


def content_hash(document: AnyDocument) -> bytes:
    """SHA-256 of the canonical JSON: equal if and only if the contents are equal."""
    return _digest(document.content(), document.where)


def group_hash(document: AnyDocument) -> bytes:
    """Like `content_hash`, but of texts normalized by `words.collapsed`.

    Documents of one group are never split between training and held-out text.
    """
    return _digest(_collapse(document.content()), document.where)


def _collapse(value: Any) -> Any:
    if isinstance(value, str):
        return collapsed(value)
    if isinstance(value, Mapping):
        return {key: _collapse(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_collapse(item) for item in value]
    return value


def _digest(content: Any, where: str) -> bytes:
    canonical = json.dumps(
        content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str
    )
    try:
        encoded = canonical.encode("utf-8")
    except UnicodeEncodeError as error:
        raise half_a_pair(canonical[error.start], where) from error
    return hashlib.sha256(encoded).digest()
