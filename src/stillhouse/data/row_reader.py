"""Reads rows from files: text, JSONL, JSON, CSV, TSV and Parquet, each also as .gz or .zst.

Training data, prompts and task texts are all read here. Every row comes with its place (`file:line`
or `file row number`); anything that cannot be read raises a DataError with that place.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from stillhouse.errors import DataError

FileFormat = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]
Rows = Iterator[tuple[dict[str, Any], str]]
"""Rows, each with its place."""

_FORMATS: dict[str, FileFormat] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED = 3
"""Rough size of a text relative to its compressed file."""
_PARQUET_BATCH = 256
"""Rows decoded at a time: memory stays flat however large a row group is."""
_LONGEST_CELL = 1 << 24
_DAMAGED = "the file is damaged or does not have the format of its name: write it again"

T = TypeVar("T")


def format_of(path: Path) -> FileFormat:
    """The format by the extension, compression aside; `text` for an unknown extension."""
    return _FORMATS.get(_extension(path), "text")


def text_size(path: Path) -> int:
    """The number of characters in a file, approximately."""
    return path.stat().st_size * (_COMPRESSED if path.suffix.lower() in _COMPRESSIONS else 1)


def _extension(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSIONS else suffix


# --- files -----------------------------------------------------------------------------------


def find_files(name: str, base: Path, format: FileFormat | None = None) -> list[Path]:
    """The files of a path, folder or glob pattern, sorted.

    base: the folder that relative paths start from. format: of the files to take from a folder;
    None: every known one. Raises DataError if there is no file.
    """
    path = (base / Path(name).expanduser()).absolute()
    if path.is_file():
        return [path]
    if path.is_dir():
        endings = [end for end, known in _FORMATS.items() if format in (None, known)]
        files = sorted(f for f in path.rglob("*") if _extension(f) in endings and f.is_file())
        if files:
            return files
        raise DataError(
            f"The folder has no {'known' if format is None else endings[0]} file",
            where=path,
            fix=f"name the files themselves: path: {name.rstrip('/')}/*.EXT",
        )
    if glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if files:
            return files
        raise DataError("No file matches", where=path, fix="check the pattern and its folder")
    raise _missing(path)


def _missing(path: Path) -> DataError:
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    fix = "check the path; a relative one starts at the recipe's folder"
    return DataError(
        "The file does not exist", where=path, fix=f"did you mean {near[0]}?" if near else fix
    )


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A UTF-8 file, decompressed. newline: as for `open`. Raises DataError, while reading too."""
    try:
        with (
            _open_bytes(path) as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as lines,
        ):
            yield lines
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _open_bytes(path: Path) -> Any:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow as pa

    path.stat()  # for the error of a missing file
    return pa.input_stream(str(path), compression=compression)


def _not_utf8(path: Path) -> DataError:
    """Names the first byte that is not UTF-8, and its line."""
    number, line = 0, ""
    with (
        _open_bytes(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape") as lines,
    ):
        while not (wrong := re.search("[\udc80-\udcff]", line)):
            number, line = number + 1, next(lines)
    byte = ord(wrong[0]) - 0xDC00
    return DataError(
        f"The file is not UTF-8: byte {byte:#04x} in line {number} cannot be read",
        where=path,
        fix=f"convert it, e.g. iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}",
    )


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return _missing(path)
    if isinstance(error, PermissionError):
        return DataError(
            "The file cannot be opened: permission denied",
            where=path,
            fix=f"allow reading it: chmod u+r {path.name}",
        )
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(f"The file cannot be read: {reason}", where=path, fix=_DAMAGED)


# --- rows ------------------------------------------------------------------------------------


def read_rows(
    path: Path,
    *,
    format: FileFormat | None = None,
    text_key: str | None = None,
    columns: Collection[str] | None = None,
) -> Rows:
    """The rows of a file, one at a time, in order, without blank lines.

    format: None: by the extension. text_key: the key for a line of plain text, or for a string in
    JSON; None: a string is an error. columns: those to read of a Parquet file; all if it has none.
    Raises DataError.
    """
    match format or format_of(path):
        case "text":
            return _text_rows(path, text_key or "text")
        case "jsonl":
            return _jsonl_rows(path, text_key)
        case "json":
            return _json_rows(path, text_key)
        case "parquet":
            return _parquet_rows(path, columns)
        case "csv" | "tsv" as kind:
            return _csv_rows(path, "\t" if "tsv" in (kind, format_of(path)) else ",")


def read_lines(lines: Iterable[str], name: str, text_key: str) -> Rows:
    """Rows of a stream: a line that begins with `{` is a JSON object, any other is plain text."""
    for number, line in enumerate(lines, 1):
        where = f"{name}:{number}"
        if line.lstrip().startswith("{"):
            yield _object(_json(line, where), where, text_key), where
        elif line.strip():
            yield {text_key: line.strip()}, where


def not_empty(items: Iterable[T], what: str, where: object) -> Iterator[T]:
    """The items. Raises DataError if there is none. what: the thing that contains them."""
    found = False
    for item in items:
        found = True
        yield item
    if not found:
        raise DataError(
            f"{what} has no text: it is empty",
            where=where,
            fix="check that the path is the one you meant, or remove it",
        )


def _text_rows(path: Path, key: str) -> Rows:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield {key: line.strip()}, f"{path}:{number}"


def _jsonl_rows(path: Path, text_key: str | None) -> Rows:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{number}"
                whole_list = number == 1 and line.lstrip().startswith("[")
                yield _object(_json(line, where, whole_list), where, text_key), where


def _json_rows(path: Path, text_key: str | None) -> Rows:
    """Rows of a list, or of an object with one: under `data`, or the only one in it."""
    with open_text(path) as file:
        whole = _json(file.read(), str(path))
    items = whole
    if isinstance(whole, dict):
        lists = {key: value for key, value in whole.items() if isinstance(value, list)}
        items = lists.get("data", next(iter(lists.values())) if len(lists) == 1 else None)
    if not isinstance(items, list):
        raise DataError(
            "The JSON file is neither a list nor an object with one list (or with `data`)",
            where=path,
            fix="write one object per line, as .jsonl",
        )
    for number, item in enumerate(items):
        where = f"{path} row {number}"
        yield _object(item, where, text_key), where


def _json(text: str, where: str, whole_list: bool = False) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            detail = f"{error.msg}, {line}column {error.colno}"
        fix = "correct the line, or remove it; each line must be one whole JSON object"
        if whole_list:
            fix = "this looks like one JSON list: name it .json, or write one object per line"
        raise DataError(f"Invalid JSON: {detail}", where=where, fix=fix) from error


def _object(value: Any, where: str, text_key: str | None) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and text_key is not None:
        return {text_key: value}
    raise DataError(
        f"The row is a JSON {type(value).__name__}, not an object",
        where=where,
        fix='write each row as an object, e.g. {"text": "..."}',
    )


def _csv_rows(path: Path, delimiter: str) -> Rows:
    csv.field_size_limit(_LONGEST_CELL)
    with open_text(path, newline="") as lines:
        # Strict: otherwise an unclosed quote makes one cell of the rest of the file.
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        start = 1
        try:
            start += 0 if reader.fieldnames is None else reader.line_num
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row:
                    raise DataError(
                        f"The row has more cells than the {len(row) - 1} columns of the header",
                        where=where,
                        fix=f"put cells that contain {delimiter!r} into double quotes",
                    )
                yield row, where
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"The row that begins here is not valid CSV: {error}",
                where=f"{path}:{start}",
                fix="close its quotes; a quote inside a quoted cell is written twice",
            ) from error


def _parquet_rows(path: Path, columns: Collection[str] | None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        compressed = path.suffix.lower() in _COMPRESSIONS
        table = pq.ParquetFile(pa.BufferReader(_open_bytes(path).read()) if compressed else path)
        names = table.schema_arrow.names
        present = [name for name in names if columns is None or name in columns]
        number = 0
        for batch in table.iter_batches(_PARQUET_BATCH, columns=present or names):
            for row in batch.to_pylist():
                yield row, f"{path} row {number}"
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
