"""Reads rows of tables: CSV, TSV, and Parquet."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from stillhouse.data.data_files import (
    READ_ERRORS,
    check_content,
    is_compressed,
    open_bytes,
    open_text,
    unreadable,
)
from stillhouse.errors import DataError

Rows = Iterator[tuple[dict[str, Any], str]]
"""Rows, each with its place for error messages."""

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_PARQUET_BATCH = 256
"""Rows decoded at a time, so that memory use does not depend on the size of a row group."""
_LONGEST_CELL = 1 << 27


# --- CSV and TSV -------------------------------------------------------------------------------


def csv_rows(path: Path, format: Literal["csv", "tsv"]) -> Rows:
    """Yield rows as dicts keyed by the header. A column without a name is skipped if it is the
    first one (such as pandas' row numbers) or empty."""
    csv.field_size_limit(_LONGEST_CELL)
    with open_text(path, format, newline="") as lines:
        skipped, head = _first_line(lines)
        delimiter = "\t" if format == "tsv" else ","
        declared = re.fullmatch(r'"?sep=(.)"?\s*', head)  # the line that Excel reads and writes
        if declared:
            delimiter = declared[1]
            more, head = _first_line(lines)
            skipped += 1 + more
        else:
            delimiter = _delimiter(head, delimiter, f"{path}:{skipped + 1}")
        # Strict, because otherwise an unclosed quote would turn the rest of the file into one cell.
        record: list[str] = []
        kept = _kept(itertools.chain([head], lines), record)
        reader = csv.reader(kept, delimiter=delimiter, strict=True)
        start = skipped + 1
        try:
            names = next(reader, [])
            _reject_spaces(names, record, delimiter, f"{path}:{start}")
            header = _header(names, f"{path}:{start}")
            start = skipped + reader.line_num + 1
            for cells in reader:
                where = f"{path}:{skipped + reader.line_num}"
                start = skipped + reader.line_num + 1
                _reject_spaces(cells, record, delimiter, where)
                blank = len(header) > 1 and not any(map(str.strip, cells))
                if cells and not blank:
                    yield _row(cells, header, delimiter, where), where
        except csv.Error as error:
            raise DataError(
                f"The row that begins here is not valid CSV: {error}",
                where=f"{path}:{start}",
                fix="close its quotes, and double any quote inside a quoted cell",
            ) from error


def _kept(lines: Iterable[str], record: list[str]) -> Iterator[str]:
    """Yield the lines, and append each to `record`."""
    for line in lines:
        record.append(line)
        yield line


def _reject_spaces(cells: Sequence[str], record: list[str], delimiter: str, where: str) -> None:
    """Raise DataError for spaces before a cell's quotes: CSV would make the quotes part of the text
    and split the cell at its delimiters. record: the row's lines; it is emptied."""
    lines = record.copy()
    record.clear()
    if not any(cell[:1] == " " and cell.lstrip(" ")[:1] == '"' for cell in cells):
        return
    try:
        meant = next(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error:
        return  # the quotes enclose only a part of the cell
    if [cell.lstrip(" ") for cell in meant] != [cell.lstrip(" ") for cell in cells]:
        raise DataError(
            "A cell has spaces before its quotes, so the quotes would be part of the text",
            where=where,
            fix=f"remove the spaces between {delimiter!r} and the quotes",
        )


def _first_line(lines: Iterator[str]) -> tuple[int, str]:
    """The number of leading blank lines, and the line after them."""
    for skipped, line in enumerate(lines):
        if line.strip("\ufeff \t\r\n"):
            return skipped, line.lstrip("\ufeff")
    return 0, ""


def _delimiter(head: str, usual: str, where: str) -> str:
    """The delimiter in the header: the usual one, or the only other one found."""
    if re.match(r"\s*(\{\s*\"|\[\s*[\[{\"])", head):
        raise DataError(
            "The file contains JSON, not a table",
            where=where,
            fix="rename it to .jsonl (one object per line) or .json (one list)",
        )
    names = re.sub(r'"(?:[^"]|"")*"', "", head)
    found = [delimiter for delimiter in _DELIMITERS if delimiter in names]
    if usual in found or not found:
        return usual
    if len(found) > 1:
        kinds = " and ".join(_DELIMITERS[delimiter] for delimiter in found)
        raise DataError(
            f"The header contains {kinds}, so the delimiter is ambiguous",
            where=where,
            fix="separate cells with commas, and put names that contain other delimiters in double "
            "quotes",
        )
    return found[0]


def _header(cells: Sequence[str], where: str) -> list[str]:
    names = [name.strip() for name in cells]
    _check_different([name for name in names if name], where)
    if cells and not any(names):
        raise DataError("The header has no names", where=where, fix="add column names to it")
    return names


def _check_different(names: Collection[str], where: object) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise DataError(
            f"Several columns have the name {twice[0]!r}", where=where, fix="rename all but one"
        )


def _row(cells: Sequence[str], header: Sequence[str], delimiter: str, where: str) -> dict[str, str]:
    if len(cells) != len(header):
        few = len(cells) < len(header)
        columns = f"{len(header)} column{'s' if len(header) > 1 else ''}"
        raise DataError(
            f"The row has {'fewer' if few else 'more'} cells than the {columns} of the header: "
            f"{len(cells)}",
            where=where,
            fix="write all cells, including empty ones; put cells with line breaks in double quotes"
            if few
            else f"put cells that contain {delimiter!r} in double quotes",
        )
    if len(cells) > 1 and [cell.strip("\ufeff \t") for cell in cells] == list(header):
        raise DataError(
            "The header is repeated here, as if files had been concatenated",
            where=where,
            fix="remove the line, and check the rows after it",
        )
    for number, (name, cell) in enumerate(zip(header, cells, strict=True)):
        if not name and number and cell.strip():
            raise DataError(
                f"Cell {number + 1} of the row is not empty, but its column has no name",
                where=where,
                fix=f"name the column in the header; or put cells that contain {delimiter!r} in "
                "double quotes",
            )
    return {name: cell for name, cell in zip(header, cells, strict=True) if name}


# --- Parquet -----------------------------------------------------------------------------------


def parquet_rows(path: Path, columns: Collection[str] | None) -> Rows:
    """Yield rows with the requested columns, or with all columns if the file has none of them.

    The ids of a Hugging Face ClassLabel become its names; -1 (no label) becomes None.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_bytes(path) as raw:
            check_content(path, raw.read(64), "parquet")
        packed = is_compressed(path)
        table = pq.ParquetFile(pa.BufferReader(open_bytes(path).read()) if packed else path)
        schema = table.schema_arrow
        _check_different(schema.names, path)
        present = [name for name in schema.names if columns is None or name in columns]
        names = _class_names((schema.metadata or {}).get(b"huggingface"))
        number = 0
        for batch in table.iter_batches(_PARQUET_BATCH, columns=present or schema.names):
            for row in batch.to_pylist():
                where = f"{path} row {number}"
                for key in names.keys() & row.keys():
                    row[key] = _class_name(row[key], names[key], key, where)
                yield row, where
                number += 1
    except DataError:
        raise
    except (pa.ArrowException, *READ_ERRORS, ValueError, OverflowError) as error:
        raise unreadable(path, error) from error


def _class_names(metadata: bytes | None) -> dict[str, list[str]]:
    """The class names of each ClassLabel column, from the metadata that `datasets` writes."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}
    return {
        key: feature["names"]
        for key, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature
    }


def _class_name(id: Any, names: Sequence[str], key: str, where: str) -> Any:
    if not isinstance(id, int):
        return id
    if -1 <= id < len(names):
        return None if id == -1 else names[id]
    raise DataError(
        f"`{key}` is {id}, but the file defines only classes 0 to {len(names) - 1}",
        where=where,
        fix="correct the row, or write the class's name",
    )
