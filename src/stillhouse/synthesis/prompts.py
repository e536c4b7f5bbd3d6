"""Prompts from a file, made into what the teacher is asked and what the student is shown.

Rows that are logs of earlier chats end with an answer: whatever follows the last turn of the user
is dropped, since the teacher is to write it anew.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.data.row_reader import not_empty, read_rows
from stillhouse.errors import DataError
from stillhouse.generation.request import Answer, Message
from stillhouse.synthesis.prompts_config import PromptFormat

Shown = Literal["prompt", "system", "all"]

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
"""Where logs keep the messages that a model was given."""
_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Prompt:
    """messages: what the file holds, up to the user's last turn. where: file and line."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class Frame:
    """What is put around every prompt. examples: pairs of a prompt and its answer.

    The system prompt is for prompts that bring none. shown: what the student is shown of it; few
    examples that only the teacher sees are how their effect is distilled.
    """

    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()
    shown: Shown = "system"

    def asked(self, prompt: Prompt) -> tuple[Message, ...]:
        """What the teacher is asked."""
        return self._around(prompt, self.system, self.examples)

    def taught(self, prompt: Prompt) -> tuple[Message, ...]:
        """What stands before the answer in the student's training text."""
        system = None if self.shown == "prompt" else self.system
        return self._around(prompt, system, self.examples if self.shown == "all" else ())

    def _around(
        self, prompt: Prompt, system: str | None, examples: Sequence[tuple[str, str]]
    ) -> tuple[Message, ...]:
        own = tuple(itertools.takewhile(lambda m: m["role"] in _SYSTEM, prompt.messages))
        rest = prompt.messages[len(own) :]
        if not own and system is not None:
            own = ({"role": "system", "content": system},)
        few = [
            {"role": role, "content": content}
            for example in examples
            for role, content in zip(("user", "assistant"), example, strict=True)
        ]
        return (*own, *few, *rest)


def read_prompts(
    path: Path, *, format: PromptFormat = "auto", key: str = "prompt", limit: int | None = None
) -> Iterator[Prompt]:
    """The prompts of a file, one at a time.

    A row holds a chat or its log (see `_LOG_PLACES`), or `prompt`, a string or messages, or a
    string under `key`; of plain text each line is one. auto: by the file's extension.
    Raises DataError with the line for whatever is no prompt.
    """
    rows = read_rows(path, format=None if format == "auto" else format, text_key=key)
    for row, where in not_empty(itertools.islice(rows, limit), "The file of prompts", path):
        yield Prompt(prompt_messages(row, key, where), where)


def text_of(messages: Sequence[Message], roles: Sequence[str] = ("user",)) -> str:
    """The contents of the messages of these roles, a line each; parts that are no text left out."""
    return "\n".join(content_text(m.get("content")) for m in messages if m["role"] in roles)


def answer_text(answer: Answer, *, keep_reasoning: bool) -> str:
    """The answer as the student is to write it, with its reasoning in <think> or without.

    A reasoning that was cut off before its end leaves no answer: the text is empty.
    """
    reasoning, closed, rest = answer.text.rpartition("</think>")
    if closed:
        reasoning = reasoning.replace("<think>", "", 1)
    elif answer.text.lstrip().startswith("<think>"):
        reasoning, rest = answer.text.replace("<think>", "", 1), ""
    reasoning = reasoning.strip() or (answer.reasoning or "").strip()
    rest = rest.strip()
    if not keep_reasoning or not reasoning or not rest:
        return rest
    return f"<think>\n{reasoning}\n</think>\n\n{rest}"


# --- one row ---------------------------------------------------------------------------------


def prompt_messages(row: Mapping[str, Any], key: str, where: str) -> tuple[Message, ...]:
    """The chat up to the user's last turn, wherever the row has it. Raises DataError."""
    found = row.get(key)
    if found is None:
        places = (_at(row, place) for place in _LOG_PLACES)
        found = next((value for value in places if isinstance(value, list)), row.get("prompt"))
    if isinstance(found, str):
        return _user(found, where)
    if isinstance(found, list):
        return _chat(found, where)
    raise DataError(
        f"the row has no `{key}` and no `messages`; its keys are {', '.join(map(str, row))}",
        where=where,
        fix="name the key that holds the prompt: synthesize.prompts.key",
    )


def _user(text: str, where: str) -> tuple[Message, ...]:
    if not text.strip():
        raise DataError("the prompt is empty", where=where, fix="remove the row")
    return ({"role": "user", "content": text},)


def _at(row: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def _chat(messages: list[Any], where: str) -> tuple[Message, ...]:
    """Known keys of each message, up to the last turn that the user (or a tool) wrote."""
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


def content_text(content: Any) -> str:
    """Of a message: a text, or a list of parts of which some are."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return " ".join(part["text"] for part in parts if isinstance(part, Mapping) and "text" in part)


UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Characters of scripts that put no spaces between words, for a regular expression's brackets."""
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation: what texts are compared by. Of a script that puts
    no spaces between words, every character is one."""
    return _WORD.findall(text.casefold())
