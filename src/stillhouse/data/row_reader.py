"""Reads rows from text, JSONL, JSON, CSV, TSV, and Parquet files, optionally compressed.

Training data, prompts, and task texts are all read here. Every row comes with its place
(`file:line` or `file row number`); anything that cannot be read raises a DataError with that place.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from stillhouse.data.clear_json import check_value, is_suspicious, parse_json
from stillhouse.data.data_files import FileFormat, format_of, known_format, open_text
from stillhouse.data.table_rows import Rows, csv_rows, parquet_rows
from stillhouse.errors import DataError, errors_at
from stillhouse.progress import note

_CORRECT = "correct the line, or remove it; each line must be one complete JSON object"
_ROW_TEXTS = (
    "text", "prompt", "completion", "instruction", "input", "output", "question", "answer",
    "query", "response",
)  # fmt: skip
"""Keys of a row's texts in the most common formats."""

_MOST_BYTES = 1 << 20
"""Read at once from standard input; a pipe holds less."""
_STREAM = "standard input"

T = TypeVar("T")


def read_rows(
    path: Path,
    *,
    format: FileFormat | None = None,
    text_key: str | None = None,
    columns: Collection[str] | None = None,
) -> Rows:
    """Yield the rows of a file in order, skipping blank lines.

    format: None: decide by the extension. text_key: the key for a line of plain text, or for a
    string in JSON; None: a string in JSON is an error. columns: the columns to read from a Parquet
    file; if it has none of them, all are read. Raises DataError.
    """
    match format or format_of(path):
        case "text":
            return _text_rows(path, text_key or "text")
        case "jsonl":
            return _jsonl_rows(path, text_key)
        case "json":
            return _json_rows(path, text_key)
        case "parquet":
            return parquet_rows(path, columns)
        case "csv" | "tsv" as kind:
            return csv_rows(path, "tsv" if "tsv" in (kind, known_format(path)) else "csv")


def arriving_lines(stream: TextIO) -> Iterator[list[str]]:
    """Yield the lines of standard input in groups that arrive together, so that a pipe or a
    terminal is not read ahead. Raises DataError for bytes that cannot be decoded."""
    decoder = codecs.getincrementaldecoder(stream.encoding)(stream.errors or "strict")
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    rest, ended = "", False
    while not ended:
        arrived: bytes = stream.buffer.read1(_MOST_BYTES)  # type: ignore[attr-defined]
        ended = not arrived
        try:
            rest += newlines.decode(arrived, final=ended)
        except UnicodeDecodeError as error:
            raise _not_utf8_stream(_STREAM) from error
        *lines, rest = rest.split("\n")
        if ended and rest:
            lines.append(rest)
        if lines:
            yield lines


def read_lines(lines: Iterable[str], name: str, text_key: str, first: int = 1) -> Rows:
    """Yield the rows of a stream. A line that begins with `{` is a JSON object; any other line is
    plain text. first: the number of the first line."""
    try:
        for number, line in enumerate(lines, first):
            where = f"{name}:{number}"
            line = line.removeprefix("\ufeff").strip()
            if re.search("[\0\ud800-\udfff]", line):
                raise _not_utf8_stream(where)
            if line.startswith("{"):
                value = _json(line, where)
                yield _object(value, where, text_key, is_suspicious(line)), where
            elif line:
                yield {text_key: line}, where
    except UnicodeDecodeError as error:
        raise _not_utf8_stream(name) from error


def _not_utf8_stream(where: str) -> DataError:
    return DataError(
        "The input is not UTF-8",
        where=where,
        fix="convert it in a pipe: iconv -f ITS-ENCODING -t UTF-8 FILE | stillhouse predict ...",
    )


def not_empty(items: Iterable[T], what: str, where: object) -> Iterator[T]:
    """Yield the items. Raises DataError if there are none. what: the container's name."""
    found = False
    for item in items:
        found = True
        yield item
    if not found:
        raise DataError(f"{what} contains no text", where=where, fix="check the path, or remove it")


def header_hint(keys: Iterable[str]) -> str:
    """The beginning of a `fix` if a table seems to have a data row instead of a header."""
    if not any(len(key) > 60 or key.count(" ") > 5 or not key for key in keys):
        return ""
    return "if the first line is a row, add a header line with column names; otherwise, "


# --- text ------------------------------------------------------------------------------------


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a plain text file with their line ends, without the byte order marks that
    joined files contain. Raises DataError if the file's extension is of a different format."""
    known = known_format(path)
    if known not in (None, "text"):
        raise DataError(
            f"The file has the extension of {known}, but the recipe reads it as plain text",
            where=path,
            fix="read its rows (`kind: file`, or `format: auto` for prompts); to use its raw text, "
            "copy it to a name that ends in .txt",
        )
    with open_text(path) as lines:
        first = next(lines, "")
        if _is_object(first):
            note(
                f"{path} is read as plain text, but its lines look like JSON objects: rename it to "
                ".jsonl if they are rows"
            )
        for line in itertools.chain([first], lines):
            yield line.removeprefix("\ufeff")


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith('{"') and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _text_rows(path: Path, key: str) -> Rows:
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            yield {key: line.strip()}, f"{path}:{number}"


# --- JSON ------------------------------------------------------------------------------------


def _jsonl_rows(path: Path, text_key: str | None) -> Rows:
    with open_text(path, "jsonl") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix("\ufeff")
            if line.strip():
                where = f"{path}:{number}"
                value = _json(line, where, _fix_of_line(line) if number == 1 else _CORRECT)
                if number == 1 and isinstance(value, list):
                    raise DataError(
                        "The line is a JSON list, not an object", where=where, fix=_fix_of_line("[")
                    )
                yield _object(value, where, text_key, is_suspicious(line)), where


def _fix_of_line(line: str) -> str:
    """The fix for a first line that is not an object."""
    if line.lstrip().startswith("["):
        return "if the file is one JSON list, rename it to .json, or write one object per line"
    if line.strip() == "{":
        return "write each object on one line: jq -c . FILE > NEW.jsonl"
    return _CORRECT


def _json_rows(path: Path, text_key: str | None) -> Rows:
    """Yield the rows of a JSON list, of an object with a list (`data`, or its only one), or of
    lines with one object each, as Hugging Face datasets and Spark write them."""
    with open_text(path, "json") as file:
        first = _to_next_text(file)
        second = _to_next_text(file) if first.lstrip().startswith("{") else ""
        a_line_each = second.strip() and _is_object(first.strip())
        text = "" if a_line_each else first + second + file.read()
    if a_line_each:
        yield from _jsonl_rows(path, text_key)
        return
    fix = "correct the file: a .json file must be one list of objects, or have one object per line"
    if text.lstrip().startswith("{"):
        fix = f"write one object per line: jq -c . {shlex.quote(str(path))} > NEW.jsonl"
    document = _json(text, str(path), fix)
    items = document
    if isinstance(document, dict):
        lists = {key: value for key, value in document.items() if isinstance(value, list)}
        items = lists.get("data", next(iter(lists.values())) if len(lists) == 1 else None)
        if items is not None and "data" not in lists and _is_row(document, items):
            items = None
        others = [
            key
            for key, value in lists.items()
            if value is not items and value and isinstance(value[0], dict)
        ]
        if items is not None and others:
            note(f"{path}: rows are read from `data`; not read: {', '.join(map(repr, others))}")
    if not isinstance(items, list):
        raise DataError(
            "The JSON file is neither a list nor an object with a single list (or with `data`)",
            where=path,
            fix="write one object per line, as .jsonl; or, if this file is not data, exclude it "
            "with a pattern in the path: *.jsonl",
        )
    suspicious = is_suspicious(text)
    for number, item in enumerate(items):
        where = f"{path} row {number}"
        yield _object(item, where, text_key, suspicious), where


def _to_next_text(lines: Iterable[str]) -> str:
    """The next lines, to the first one that is not blank."""
    found = ""
    for line in lines:
        found += line
        if line.strip():
            break
    return found


def _is_row(document: dict[str, Any], items: list[Any]) -> bool:
    """Whether an object with a single list is itself a row: the list is a chat's messages, or the
    object also has a row's texts."""
    first = items[0] if items else None
    chat = isinstance(first, dict) and bool({"role", "from"} & first.keys())
    return chat or any(
        isinstance(value, str) and key.lower() in _ROW_TEXTS for key, value in document.items()
    )


def _json(text: str, where: str, fix: str = _CORRECT) -> Any:
    """Parse JSON. Raises DataError if it is invalid or an object has a duplicate key."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            detail = f"{error.msg}, {line}column {error.colno}"
        elif "int_max_str_digits" in detail:
            detail = "a number has more than 4,300 digits"
        raise DataError(f"Invalid JSON: {detail}", where=where, fix=fix) from error


def _object(value: Any, where: str, text_key: str | None, suspicious: bool) -> dict[str, Any]:
    if suspicious:
        with errors_at(where):
            check_value(value)
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and text_key is not None:
        return {text_key: value}
    raise DataError(
        f"The row is a JSON {type(value).__name__}, not an object",
        where=where,
        fix='write each row as an object, e.g. {"text": "..."}',
    )
