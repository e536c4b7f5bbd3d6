"""Reads logs of chat completions, and detects their task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stillhouse.data.chat_formats import as_messages, with_known_role
from stillhouse.data.clear_json import value_at
from stillhouse.data.data_files import FileFormat, known_format
from stillhouse.data.loss_flags import LEARNED
from stillhouse.data.question_formats import is_pair, read_pair
from stillhouse.data.reasoning import MARKS
from stillhouse.data.row_reader import read_rows
from stillhouse.data.words import bare
from stillhouse.errors import DataError, errors_at
from stillhouse.generation.chat_frame import SYSTEM, content_text, text_of
from stillhouse.progress import note
from stillhouse.synthesis.prompts import prompt_messages

FEWEST = 8
"""Minimum number of rows from which a task is detected."""
_LABEL_CHARACTERS = 60
_MOST_LABELS = 200
_CHATS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("conversation",),
    ("request", "messages"),
    ("messages", "data"),
)
_CHOICES: tuple[tuple[str, ...], ...] = (
    ("response", "body", "choices"),
    ("response", "choices"),
    ("choices",),
)
"""Where logs store a chat with its answer, or the answer next to the chat."""
_JSON_SHARE = 0.9
_JSON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


@dataclass(frozen=True)
class Logs:
    """Logs of chats. pairs: the last user turn and its answer. system: the most frequent system
    prompt."""

    pairs: Sequence[tuple[str, str]]
    system: str | None

    @property
    def job(self) -> str:
        """The task: `extract` for JSON objects, `classify` for a few short answers that repeat,
        otherwise `generate`."""
        values = [json_object(answer) for _, answer in self.pairs]
        if sum(value is not None for value in values) >= _JSON_SHARE * len(values):
            return "extract"
        counts = Counter(self._spelled(answer) for _, answer in self.pairs)
        short = all(len(answer) <= _LABEL_CHARACTERS for answer in counts)
        if short and 2 <= len(counts) <= min(_MOST_LABELS, len(self.pairs) / 3):
            return "classify"
        return "generate"

    @property
    def labels(self) -> list[str]:
        """The labels of a classifier, the most frequent first; empty for other tasks."""
        if self.job != "classify":
            return []
        counts = Counter(self._spelled(answer) for _, answer in self.pairs)
        return [answer for answer, _ in counts.most_common()]

    def _spelled(self, answer: str) -> str:
        """The most frequent spelling of the same label."""
        return self._spellings[_plain(answer)]

    @cached_property
    def _spellings(self) -> dict[str, str]:
        counts = Counter(answer for _, answer in self.pairs)
        return {_plain(answer): answer for answer, _ in reversed(counts.most_common())}

    @property
    def schema(self) -> dict[str, Any]:
        """A JSON schema that allows all JSON objects among the answers."""
        objects = [value for _, answer in self.pairs if (value := json_object(answer)) is not None]
        kinds: dict[str, set[str]] = {}
        for value in objects:
            for key, part in value.items():
                kinds.setdefault(key, set()).add(_JSON_TYPES[type(part)])
        return {
            "type": "object",
            "properties": {
                key: {"type": next(iter(found)) if len(found) == 1 else sorted(found)}
                for key, found in kinds.items()
            },
            "required": [key for key in kinds if all(key in value for value in objects)],
            "additionalProperties": False,
        }

    def rows(self, job: str) -> str:
        """JSON lines of text and answer: for extraction, only those with JSON answers; for a
        classifier, with the spelling in `labels`."""
        pairs = [
            (text, self._spelled(answer) if job == "classify" else answer)
            for text, answer in self.pairs
            if job != "extract" or json_object(answer) is not None
        ]
        rows = (json.dumps({"text": t, "answer": a}, ensure_ascii=False) for t, a in pairs)
        return "".join(f"{row}\n" for row in rows)


def read_logs(path: Path) -> Logs:
    """Read logs of chats: messages with an answer, or a request with its response.

    Only the last turn of a longer chat is used, which is reported. A file without a known extension
    is read as JSONL. Raises DataError if the file cannot be read, or too few rows have an answer.
    """
    pairs: list[tuple[str, str]] = []
    systems: Counter[str] = Counter()
    rows = longer = 0
    for row, where in read_rows(path, format=logs_format(path)):
        with errors_at(where):
            messages, answer = prompt_messages(row, "prompt"), _answer(row)
        rows += 1
        text = text_of(messages[-1:])
        if answer is None or not text.strip():
            continue
        pairs.append((text, answer))
        longer += sum(message["role"] == "user" for message in messages) > 1
        systems[text_of(messages, SYSTEM)] += 1
    if len(pairs) < FEWEST:
        raise DataError(
            f"{len(pairs)} of {rows} rows have a text and an answer, but at least {FEWEST} are "
            "needed",
            where=path,
            fix="add more rows"
            if len(pairs) == rows
            else 'write each line as {"messages": [...]}, ending with the answer',
        )
    if longer:
        note(
            f"{longer:,} of {len(pairs):,} chats have several turns: only the last user turn and "
            "its answer are used"
        )
    system = systems.most_common(1)[0][0]
    return Logs(pairs, system or None)


def logs_format(path: Path) -> FileFormat:
    known = known_format(path)
    return "jsonl" if known in (None, "text") else known


def _answer(row: Mapping[str, Any]) -> str | None:
    """The last assistant turn, wherever the log stores it; None if it is marked as not to learn."""
    for place in _CHATS:
        messages = as_messages(value_at(row, place))
        if isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
            last = with_known_role(messages[-1], "the last message")
            if last["role"] == "assistant":
                return None if any(last.get(key) == 0 for key in LEARNED) else _said(last)
    for place in _CHOICES:
        choices = value_at(row, place)
        if isinstance(choices, list) and choices:
            return _said(value_at(choices[0], ("message",)))
    given = {key: value for key, value in row.items() if value is not None}
    if is_pair(given):
        return _said(read_pair(given)[0].messages[-1])
    return None


def _said(message: Any) -> str | None:
    return MARKS.split(content_text(value_at(message, ("content",)))).answer.strip() or None


def _plain(answer: str) -> str:
    """A label without case, underscores, and punctuation at the ends."""
    return bare(answer.replace("_", " "))


def json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
