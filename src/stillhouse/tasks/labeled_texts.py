"""Reads texts and their reference labels or answers from files, and divides them into parts."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

from stillhouse.data.data_files import FileFormat, known_format
from stillhouse.data.file_search import find_files
from stillhouse.data.row_reader import (
    arriving_lines,
    header_hint,
    not_empty,
    read_lines,
    read_rows,
)
from stillhouse.data.words import collapsed, normalized
from stillhouse.errors import DataError
from stillhouse.runfolder import sha
from stillhouse.section import made
from stillhouse.tasks.task_texts_config import TextFile

Reference = Callable[[Any, str], str | None]
"""Called with a value of the label column and the row's place."""

_LIST = re.compile(r"\s*[\[{(]\s*['\"].*['\"]\s*,?\s*[\]})]\s*", re.DOTALL)
"""A list as text, in JSON or as Python prints it."""
_VALUE = re.compile(r"\d{4}-\d\d-\d\d|https?://|[^@\s]+@[^@\s]+\.\w")
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
_YEAR = re.compile(r"(19|20)\d\d")

FEWEST = 4
"""Minimum number of texts in a part to train or measure on."""


@dataclass(frozen=True)
class LabeledText:
    """gold: the reference label or answer, None if unknown. where: file and row."""

    text: str
    gold: str | None = None
    where: str = ""


def files_sha256(files: Sequence[TextFile], base: Path) -> list[str]:
    return [sha(path) for file in files for path in find_files(file.path, base)]


def read_files(
    files: Sequence[TextFile], base: Path, reference: Reference | None = None
) -> list[LabeledText]:
    """The rows of all files. Raises DataError."""
    return [row for file in files for row in read_texts(file, base, reference)]


def read_texts(
    file: TextFile, base: Path, reference: Reference | None = None
) -> Iterator[LabeledText]:
    """The rows of a file, or of all files of a folder or glob. Raises DataError.

    reference: `label_of` (the default) or `answer_of`: how to read the label column.
    """
    found = itertools.islice(_read_all(file, base, reference or label_of), file.limit)
    if file.sample is None:
        return found
    # By content, so that adding a row does not move others.
    return iter(heapq.nsmallest(file.sample, found, key=lambda row: content_place(row, "draw")))


def file_texts(path: Path, key: str) -> Iterator[str]:
    """The texts of a file; see `read_rows`. Raises DataError."""
    file = made(TextFile, {"path": str(path), "text": key}, "predict")
    return (row.text for row in read_texts(file, Path.cwd()))


def stream_texts(lines: Iterable[str], key: str, first: int = 1) -> Iterator[str]:
    """One text per line, or one object per line with the text under `key`. Raises DataError.

    first: the number of the first line."""
    file = TextFile(path="-", text=key)
    for row, where in read_lines(lines, "standard input", key, first):
        yield labeled_text(row, file, where).text


def arriving_texts(stream: TextIO, key: str) -> Iterator[Iterator[str]]:
    """The texts of standard input, in groups that arrive together; see `stream_texts`."""
    first = 1
    for lines in arriving_lines(stream):
        yield stream_texts(lines, key, first)
        first += len(lines)


def first_rows(
    path: str, base: Path, format: FileFormat | None = None, count: int = 1
) -> list[Mapping[str, Any]]:
    """All columns of the first rows of the first file, at least one and at most so many; for plain
    text, each line under `text`. Raises DataError."""
    file = find_files(path, base)[0]
    rows = read_rows(file, format=format, text_key="text")
    found = list(itertools.islice(not_empty(rows, "The file", file), count))
    first, where = found[0]
    is_table = known_format(file) in ("csv", "tsv")
    if is_table and (header_hint(first) or _are_values(list(first))):
        raise DataError(
            f"The file seems to have no header: its columns would be {', '.join(first)[:80]}",
            where=where,
            fix="write the names of the columns into a line before the first row",
        )
    return [row for row, _ in found]


def _are_values(names: Sequence[str]) -> bool:
    """Whether a name of a column is rather a value: a date, an address or a number, except years,
    and numbers in a row, as pandas names columns."""
    if any(_VALUE.match(name.strip()) for name in names):
        return True
    numbers = [name.strip() for name in names if _NUMBER.fullmatch(name.strip())]
    if all(_YEAR.fullmatch(number) for number in numbers):
        return False
    counted = [str(number) for number in range(len(numbers))]
    from_one = [str(number + 1) for number in range(len(numbers))]
    return numbers != counted and (len(numbers) == 1 or numbers != from_one)


def labeled_text(
    row: Mapping[str, Any], file: TextFile, where: str, reference: Reference | None = None
) -> LabeledText:
    """The row's text and label, under the keys named by `file`. Raises DataError."""
    text = row.get(file.text)
    if file.text not in row or not isinstance(text, str):
        is_it = f"; its value is of type {type(text).__name__}" if file.text in row else ""
        raise DataError(
            f"the row has no text under {file.text!r}{is_it}; it has {', '.join(map(str, row))}",
            where=where,
            fix=f"{header_hint(row)}name the column or key of the text: text: NAME (--text NAME of "
            "`predict`)",
        )
    if not text.strip():
        raise DataError("the text is empty", where=where, fix="remove the row")
    if file.label is None:
        return LabeledText(text, None, where)
    if file.label not in row:
        raise DataError(
            f"the row has no label under {file.label!r}; it has {', '.join(map(str, row))}",
            where=where,
            fix="name the label's column or key, or leave `label` out",
        )
    return LabeledText(text, (reference or label_of)(row[file.label], where), where)


def label_of(value: Any, where: str) -> str | None:
    """A label as text in NFC; None for an empty cell or NaN. 1.0 becomes 1.

    Raises DataError for a value that is not a label: a list, an object, a score.
    """
    if isinstance(value, float | Decimal) and not math.isnan(value):
        whole = math.isfinite(value) and value == int(value)
        value = int(value) if whole else value
    if _is_empty(value):
        return None
    listed = isinstance(value, list) or (isinstance(value, str) and _LIST.fullmatch(value))
    if isinstance(value, str | int) and not listed:
        return collapsed(str(value))
    if listed:
        what, fix = "a list", "write one label; several labels per text are a different task"
    elif isinstance(value, float | Decimal):
        what, fix = f"the number {value}", "name the column that holds the classes"
    else:
        what, fix = f"of type {type(value).__name__}", "write the label as a string"
    raise DataError(f"the label is {what}, not a name", where=where, fix=fix)


def answer_of(value: Any, where: str) -> str | None:
    """A reference answer as text; None for an empty cell. Other values become JSON.

    Raises DataError for what JSON does not have: dates, bytes, NaN.
    """
    if _is_empty(value):
        return None
    if isinstance(value, str):
        return value.strip()
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the reference answer cannot be written as JSON: {error}",
            where=where,
            fix="write dates and bytes as strings, and remove NaN",
        ) from error


def _is_empty(value: Any) -> bool:
    """pandas writes an empty cell as NaN."""
    if isinstance(value, str):
        return value.strip() in ("", "nan", "NaN")
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def content_place(row: LabeledText, purpose: str) -> bytes:
    """The text's place in an order that depends on nothing else but the purpose."""
    return hashlib.sha256(f"{purpose} {row.text}".encode("utf-8", "replace")).digest()


def _read_all(file: TextFile, base: Path, reference: Reference) -> Iterator[LabeledText]:
    columns = [key for key in (file.text, file.label) if key is not None]
    for path in find_files(file.path, base):
        for row, where in read_rows(path, text_key=file.text, columns=columns):
            yield labeled_text(row, file, where, reference)


# --- parts ----------------------------------------------------------------------------------------


def divide_texts(
    given: Sequence[LabeledText],
    tests: Sequence[LabeledText],
    test_share: float,
    seed: int,
    examples: Sequence[str] = (),
) -> tuple[list[LabeledText], list[LabeledText], int]:
    """Training texts in random order, and test texts, without duplicates; and the number of
    duplicates.

    The content of a text and the seed decide its part, so the order of the files and other
    texts hardly matter. test_share: of `given`, if there are no test texts. examples: texts in the
    teacher's prompt, with their answers; they are excluded from the test texts.
    """
    seen: set[str] = set()
    known = set(map(normalized, examples))
    kept_tests = [row for row in _unrepeated(tests, seen) if normalized(row.text) not in known]
    kept = sorted(_unrepeated(given, seen), key=lambda row: content_place(row, str(seed)))
    repeated = len(given) + len(tests) - len(kept) - len(kept_tests)
    if not tests:
        apart = round(test_share * len(kept))
        kept_tests = [row for row in kept[:apart] if normalized(row.text) not in known]
        shown = [row for row in kept[:apart] if normalized(row.text) in known]
        kept = [*shown, *kept[apart:]]
    return kept, kept_tests, repeated


def require_enough(parts: Mapping[str, Sequence[LabeledText]]) -> None:
    """Raise DataError for a part with too few texts."""
    for name, rows in parts.items():
        if len(rows) < FEWEST:
            raise DataError(
                f"the {name} part has {len(rows)} texts, and {FEWEST} are the fewest",
                where="data",
                fix="give more texts, or change the shares of the parts in `data`",
            )


def _unrepeated(rows: Sequence[LabeledText], seen: set[str]) -> Iterator[LabeledText]:
    """Rows without duplicate texts, ignoring case, whitespace and Unicode form."""
    for row in rows:
        key = normalized(row.text)
        if key not in seen:
            seen.add(key)
            yield row
