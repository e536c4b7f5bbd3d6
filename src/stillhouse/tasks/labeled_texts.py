"""Reads texts with reference labels or answers from files, and divides them into parts."""

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
from stillhouse.data.row_reader import arriving_lines, header_hint, not_empty, read_lines, read_rows
from stillhouse.data.words import collapsed, normalized
from stillhouse.errors import DataError
from stillhouse.section import made
from stillhouse.tasks.task_texts_config import TextFile

Reference = Callable[[Any, str], str | None]
"""Converts a value of the label column; also called with the row's place."""

_LIST = re.compile(r"\s*[\[{(]\s*['\"].*['\"]\s*,?\s*[\]})]\s*", re.DOTALL)
"""A list as text, in JSON or as printed by Python."""
_VALUE = re.compile(r"\d{4}-\d\d-\d\d|https?://|[^@\s]+@[^@\s]+\.\w")
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
_YEAR = re.compile(r"(19|20)\d\d")

FEWEST = 4
"""Minimum number of texts in a part that is trained or evaluated on."""


@dataclass(frozen=True)
class LabeledText:
    """A text. gold: its reference label or answer; None if unknown. where: file and row."""

    text: str
    gold: str | None = None
    where: str = ""


def read_files(
    files: Sequence[TextFile], base: Path, reference: Reference | None = None
) -> list[LabeledText]:
    """Read the texts of all files. Raises DataError."""
    return [row for file in files for row in read_texts(file, base, reference)]


def read_texts(
    file: TextFile, base: Path, reference: Reference | None = None
) -> Iterator[LabeledText]:
    """Yield the texts of a file, or of all files in a folder or glob. Raises DataError.

    reference: how to read the label column: `label_of` (the default) or `answer_of`.
    """
    columns = [key for key in (file.text, file.label) if key is not None]
    rows = (
        labeled_text(row, file, where, reference)
        for path in find_files(file.path, base)
        for row, where in read_rows(path, text_key=file.text, columns=columns)
    )
    found = itertools.islice(rows, file.limit)
    if file.sample is None:
        return found
    # Sample by content, so that adding a row does not affect others.
    return iter(heapq.nsmallest(file.sample, found, key=lambda row: content_place(row, "draw")))


def file_texts(path: Path, key: str) -> Iterator[str]:
    """Yield the texts of a file; see `read_rows`. Raises DataError."""
    file = made(TextFile, {"path": str(path), "text": key}, "predict")
    return (row.text for row in read_texts(file, Path.cwd()))


def stream_texts(lines: Iterable[str], key: str, first: int = 1) -> Iterator[str]:
    """Yield texts from lines: each is a text, or an object with a text under `key`.

    first: the number of the first line. Raises DataError.
    """
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
    """Read all columns of up to `count` rows from the beginning of the first file.

    Lines of plain text are under `text`. Raises DataError, also if there is no row.
    """
    file = find_files(path, base)[0]
    rows = read_rows(file, format=format, text_key="text")
    found = list(itertools.islice(not_empty(rows, "The file", file), count))
    first, where = found[0]
    is_table = known_format(file) in ("csv", "tsv")
    if is_table and (header_hint(first) or _are_values(list(first))):
        raise DataError(
            f"The file seems to have no header: its columns would be {', '.join(first)[:80]}",
            where=where,
            fix="add a header line with column names before the first row",
        )
    return [row for row, _ in found]


def _are_values(names: Sequence[str]) -> bool:
    """Whether a column name looks like a value: a date, an address, or a number; but not years, or
    consecutive numbers, as pandas names columns."""
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
    """Read the row's text and label from the keys named by `file`. Raises DataError."""
    text = row.get(file.text)
    if file.text not in row or not isinstance(text, str):
        is_it = f"; its value is of type {type(text).__name__}" if file.text in row else ""
        raise DataError(
            f"the row has no text under {file.text!r}{is_it}; its keys are "
            f"{', '.join(map(str, row))}",
            where=where,
            fix=f"{header_hint(row)}set the column or key of the text: text: NAME in the recipe, "
            "or --text NAME of `predict`",
        )
    if not text.strip():
        raise DataError("the text is empty", where=where, fix="remove the row")
    if file.label is None:
        return LabeledText(text, None, where)
    if file.label not in row:
        raise DataError(
            f"the row has no label under {file.label!r}; its keys are {', '.join(map(str, row))}",
            where=where,
            fix="set `label` to the label's column or key, or remove it",
        )
    return LabeledText(text, (reference or label_of)(row[file.label], where), where)


def label_of(value: Any, where: str) -> str | None:
    """Convert a label to text in NFC; None for an empty cell or NaN. 1.0 becomes 1.

    Raises DataError for a value that is not a label, such as a list, an object, or a score.
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
        what, fix = f"the number {value}", "set `label` to the column of the classes"
    else:
        what, fix = f"of type {type(value).__name__}", "write the label as a string"
    raise DataError(f"the label is {what}, not a name", where=where, fix=fix)


def answer_of(value: Any, where: str) -> str | None:
    """Convert a reference answer to text; None for an empty cell. Non-strings become JSON.

    Raises DataError for values that JSON does not support, such as dates, bytes, and NaN.
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
    """Whether a cell is empty; pandas writes an empty cell as NaN."""
    if isinstance(value, str):
        return value.strip() in ("", "nan", "NaN")
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def content_place(row: LabeledText, purpose: str) -> bytes:
    """The text's place in a random order that depends only on the text and the purpose."""
    return hashlib.sha256(f"{purpose} {row.text}".encode("utf-8", "replace")).digest()


# --- parts ----------------------------------------------------------------------------------------


def divide_texts(
    given: Sequence[LabeledText],
    tests: Sequence[LabeledText],
    test_share: float,
    seed: int,
    examples: Sequence[str] = (),
) -> tuple[list[LabeledText], list[LabeledText], int]:
    """Divide texts into training texts, in random order, and test texts, without duplicates.

    A text's part depends on its content and the seed, and hardly on other texts or the order of the
    files. test_share: share of `given` to split off if there are no test texts. examples: texts
    that the teacher's prompt contains with their answers; they are excluded from the test texts.
    Returns the training texts, the test texts, and the number of duplicates.
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
                f"the {name} part has {len(rows)} texts, but needs at least {FEWEST}",
                where="data",
                fix="add texts, or change the shares of the parts in `data`",
            )


def _unrepeated(rows: Sequence[LabeledText], seen: set[str]) -> Iterator[LabeledText]:
    """Yield the rows without duplicate texts, ignoring case, whitespace, and Unicode form."""
    for row in rows:
        key = normalized(row.text)
        if key not in seen:
            seen.add(key)
            yield row
