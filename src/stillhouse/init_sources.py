"""Inspects the user's data for `stillhouse init`: the sources of a training text, and the columns
of a table."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from stillhouse.data.chatgpt_export import is_chatgpt_export
from stillhouse.data.data_files import (
    FileFormat,
    extension_of,
    format_of,
    is_text,
    known_format,
    text_size,
)
from stillhouse.data.documents import Conversation
from stillhouse.data.file_search import find_files, other_texts, unread_files, unread_summary
from stillhouse.data.row_formats import document_from_row
from stillhouse.data.row_reader import text_lines
from stillhouse.data.sources import CHARACTERS_PER_TOKEN
from stillhouse.errors import DataError
from stillhouse.progress import note
from stillhouse.synthesis.chat_logs import logs_format
from stillhouse.tasks.labeled_texts import first_rows

CORPUS = "python-reference"
_CORPUS_TOKENS = 110_000
"""The size of the bundled text."""
_MANY_FILES = 10
"""With at least so many text files, each file is one document."""
_LABEL_KEYS = ("label", "category", "class", "topic", "intent", "answer")
SAMPLED_ROWS = 50
"""The number of rows that are read to choose a table's text column."""
_EXPORTED = "conversations*.json"
"""The chats in the folder of a ChatGPT data export; its other files are metadata."""
_QUESTION_CHARACTERS = 400
_WORD = re.compile(r"[^\W\d_]{2}")


def training_sources(data: str, logs: bool) -> list[dict[str, str]]:
    """Return the sources to read the training text from. A folder's files of unusual types, such as
    Markdown, need a separate pattern.

    logs: whether to read files of unknown formats as JSONL. Raises DataError if the text cannot be
    read.
    """
    if data == CORPUS:
        return [{"kind": "corpus"}]
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return [_source(data, logs)]
    name = data.rstrip("/") or "/"
    exported = sorted(folder.glob(_EXPORTED))
    if exported and is_chatgpt_export(first_rows(str(exported[0]), Path.cwd(), count=1)[0]):
        data, endings = f"{name}/{exported[0].name if len(exported) == 1 else _EXPORTED}", set()
    else:
        unread = unread_files(folder)
        if unread:
            summary = unread_summary(unread)
            note(f"{folder}: not read: {summary} (supported files: docs/data.md#files)")
        endings = {extension_of(file) for file in other_texts(folder)}
    patterns = [f"{name}/**/*{ending}" for ending in sorted(endings)]
    try:
        first = [_source(data, logs)]
    except DataError:
        if not patterns:
            raise
        first = []
    return first + [_source(pattern, logs) for pattern in patterns]


def source_tokens(sources: Sequence[Mapping[str, str]]) -> list[float]:
    """Estimate the tokens in each source; a file that several sources contain counts once."""
    sizes, known = list[float](), set[Path]()
    for source in sources:
        if source["kind"] == "corpus":
            sizes.append(_CORPUS_TOKENS)
            continue
        files = set(find_files(source["path"], Path.cwd())) - known
        sizes.append(sum(map(text_size, files)) / CHARACTERS_PER_TOKEN)
        known |= files
    return sizes


def require_files(data: str) -> None:
    """Raise DataError if a path, folder, or pattern contains nothing that can be read."""
    folder = Path(data).expanduser()
    if not folder.is_dir() or not other_texts(folder):
        find_files(data, Path.cwd())


def _source(data: str, logs: bool) -> dict[str, str]:
    """The keys of a path's source."""
    files = find_files(data, Path.cwd())
    formats = {file: logs_format(file) if logs else _format(file, data) for file in files}
    if set(formats.values()) == {"text"}:
        return {"kind": "text", "documents": _documents(files), "path": data}
    first = next(file for file in files if formats[file] != "text")
    # A log with any other extension is JSONL.
    kind = "file" if formats[first] == known_format(first) else formats[first]
    rows = first_rows(str(first), Path.cwd(), formats[first], SAMPLED_ROWS)
    try:
        document_from_row(rows[0], "text", str(first))
    except DataError:
        nested = any(isinstance(value, list | dict) and value for value in rows[0].values())
        if logs or nested or {"messages", "prompt", "completion"} & rows[0].keys():
            raise
        return {"kind": kind, "text_key": text_column(rows, first), "path": data}
    return {"kind": kind, "path": data}


def _format(file: Path, named: str) -> FileFormat:
    """Return a file's format. A file with an unknown extension, such as source code, is read as
    text if it is text and a pattern named it."""
    return "text" if glob.has_magic(named) and is_text(file) else format_of(file)


def _documents(files: Sequence[Path]) -> str:
    """Choose how to split plain text into documents: several are needed to hold some out."""
    if len(files) >= _MANY_FILES:
        return "file"
    blank = itertools.islice((line for line in text_lines(files[0]) if not line.strip()), 2)
    return "blank-line" if len(list(blank)) == 2 else "line"


def text_column(
    rows: Sequence[Mapping[str, Any]], file: str | Path, label_key: str | None = None
) -> str:
    """Choose the column `text`, or else the one with the longest texts; print a note if other
    columns contain text too.

    Raises DataError if no column contains text.
    """
    if any(isinstance(row.get("text"), str) for row in rows):
        return "text"
    lengths = {key: _length(rows, key) for row in rows for key in row if key != label_key}
    texts = sorted((key for key in lengths if lengths[key]), key=lambda key: -lengths[key])
    if not texts:
        raise DataError(
            f"no column contains text: the columns are {', '.join(map(str, lengths))}"[:300],
            where=file,
            fix="pass a file with a column of texts, ideally named `text`",
        )
    if len(texts) > 1:
        note(
            f"{file}: reading the text from column {texts[0]!r}, not from "
            f"{', '.join(map(repr, texts[1:]))}; to use a different column, edit the recipe"
        )
    return texts[0]


def _length(rows: Sequence[Mapping[str, Any]], key: str) -> int:
    """Count the characters of a column's texts; strings without a word (numbers, dates) are
    skipped."""
    values = (row.get(key) for row in rows)
    return sum(len(one) for one in values if isinstance(one, str) and _WORD.search(one))


def label_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The first column with a usual name for labels, in which some rows may have none."""
    return next(
        (key for key in _LABEL_KEYS if any(row.get(key) not in (None, "") for row in rows)), None
    )


def has_chats(sources: Sequence[Mapping[str, str]]) -> bool:
    """Whether the first row of the first source is a chat."""
    return next(_first_chats(sources, 1), None) is not None


def first_questions(sources: Sequence[Mapping[str, str]], most: int) -> list[str]:
    """The first short user questions, at most so many, from the first source's chats."""
    found: dict[str, None] = {}
    for chat in _first_chats(sources, SAMPLED_ROWS):
        turn = next((turn for turn in chat.messages if turn.get("role") == "user"), {})
        asked = turn.get("content")
        if isinstance(asked, str) and 0 < len(asked.strip()) <= _QUESTION_CHARACTERS:
            found[asked.strip()] = None
    return list(found)[:most]


def _first_chats(sources: Sequence[Mapping[str, str]], rows: int) -> Iterator[Conversation]:
    """Yield the chats in the first rows of the first source. Skips unreadable rows, which `check`
    reports."""
    source = sources[0] if sources else {"kind": "text"}
    if source["kind"] in ("corpus", "text") or "text_key" in source:
        return
    file = find_files(source["path"], Path.cwd())[0]
    format = None if source["kind"] == "file" else logs_format(file)
    for row in first_rows(str(file), Path.cwd(), format, rows):
        with suppress(DataError):
            document = document_from_row(row, "text", str(file))
            if isinstance(document, Conversation):
                yield document
