"""Keeps tokenized documents in a file, which saves memory and lets a killed run resume.

The file begins with a line that identifies what the tokens depend on. After it, every batch of
documents is one record: a line of JSON, the tokens as int32, and a hash of both. Tokens that are
not supervised are written as their bitwise complement, which is negative. A record is reused only
if it is complete and was made from the same documents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from stillhouse.data.tokenize_rows import Ids, Mask, TokenRow

_TOKEN = np.dtype("<i4")
_LONGEST_LINE = 1 << 26
"""In bytes. After a machine crash, a file can end in zeros without a newline."""


class LoggedRow(NamedTuple):
    """A `TokenRow` in a log. start: byte offset of its first token in the file."""

    start: int
    tokens: int
    splittable: bool
    notes: tuple[str, ...]


class TokenLog:
    """A file of tokenized documents.

    file: open for reading and writing. written_with: identifies what the tokens depend on besides
    the documents; a file with a different value is emptied.
    """

    def __init__(self, file: BinaryIO, written_with: str = "") -> None:
        self._file = file
        head = json.dumps(written_with).encode() + b"\n"
        file.seek(0)
        self._continues = file.read(len(head)) == head
        self._end = len(head)
        if not self._continues:
            file.seek(0)
            file.truncate()
            file.write(head)

    def find(self, documents: str) -> list[list[LoggedRow]] | None:
        """Return the rows of the next batch if an earlier process wrote it.

        documents: a hash of the batch's documents. If the record is incomplete or was made from
        different documents, returns None and discards the rest of the file.
        """
        if not self._continues:
            return None
        self._file.seek(self._end)
        line = self._file.readline(_LONGEST_LINE)
        try:
            head = json.loads(line)
            lengths = [length for _, lengths, _ in head["rows"] for length in lengths]
            tokens = self._file.read(sum(lengths) * _TOKEN.itemsize)
            complete = self._file.read(16) == xxhash.xxh3_128_digest(line + tokens)
        except (ValueError, LookupError, TypeError):
            complete = False
        if complete and head["documents"] == documents:
            return self._placed(head["rows"], len(line))
        self._continues = False
        self._file.seek(self._end)
        self._file.truncate()
        return None

    def append(self, documents: str, rows: Sequence[Sequence[TokenRow]]) -> list[list[LoggedRow]]:
        """Write the rows of a batch, grouped by document."""
        described = [
            (each[0].splittable, [len(row.ids) for row in each], each[0].notes) for each in rows
        ]
        line = json.dumps({"documents": documents, "rows": described}).encode() + b"\n"
        parts = (np.where(row.supervised, row.ids, ~row.ids) for each in rows for row in each)
        tokens = b"".join(part.astype(_TOKEN).tobytes() for part in parts)
        self._file.seek(self._end)
        self._file.write(line + tokens + xxhash.xxh3_128_digest(line + tokens))
        self._file.flush()
        return self._placed(described, len(line))

    def _placed(self, described: Sequence[Any], line: int) -> list[list[LoggedRow]]:
        """Locate the rows of the record that begins at the end of the log, and move the end."""
        place, rows = self._end + line, []
        for splittable, lengths, notes in described:
            found: list[LoggedRow] = []
            for length in lengths:
                found.append(LoggedRow(place, length, splittable, () if found else tuple(notes)))
                place += length * _TOKEN.itemsize
            rows.append(found)
        self._end = place + 16
        return rows

    def read(self, start: int, first: int, count: int) -> tuple[Ids, Mask]:
        """Read `count` tokens and their loss mask, from token `first` of the row at `start`."""
        self._file.seek(start + first * _TOKEN.itemsize)
        written = np.frombuffer(self._file.read(count * _TOKEN.itemsize), dtype=_TOKEN)
        return np.where(written < 0, ~written, written), written >= 0
