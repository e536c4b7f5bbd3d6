"""Opens and checks the file of a journal, and recovers it if it is damaged.

SQLite notices damaged pages, but not a changed letter inside an answer, so each row has a hash of
its values. The lock file next to the journal contains the numbers of answers and commits, because
SQLite silently drops a damaged write-ahead log.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import xxhash

from stillhouse.errors import RunError
from stillhouse.file_locks import try_lock
from stillhouse.progress import note

VERSION = 3
TABLES = {"answers": "an answer", "failures": "a failed request", "reservations": "a reservation"}
"""What a row of each table is called in messages."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    messages TEXT NOT NULL,
    parameters TEXT NOT NULL,
    sample INTEGER NOT NULL,
    text TEXT NOT NULL,
    finish_reason TEXT,
    reasoning TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cost REAL,
    seconds REAL NOT NULL,
    logprobs TEXT,
    arrived REAL NOT NULL,
    xxh3 TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    messages TEXT NOT NULL,
    kind TEXT NOT NULL,
    reason TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    cost REAL,
    tokens INTEGER NOT NULL,
    happened REAL NOT NULL,
    xxh3 TEXT
);
CREATE INDEX IF NOT EXISTS failures_by_key ON failures (key);
CREATE TABLE IF NOT EXISTS reservations (
    key TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    messages TEXT NOT NULL,
    cost REAL,
    tokens INTEGER NOT NULL,
    happened REAL NOT NULL,
    xxh3 TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS commits (number INTEGER NOT NULL);
INSERT INTO commits SELECT 0 WHERE NOT EXISTS (SELECT * FROM commits);
"""
ADD_ANSWER = f"INSERT OR IGNORE INTO answers VALUES ({', '.join('?' * 16)})"
ADD_FAILURE = f"INSERT INTO failures VALUES (NULL, {', '.join('?' * 10)})"
ADD_RESERVATION = f"INSERT OR REPLACE INTO reservations VALUES ({', '.join('?' * 7)})"
COUNT_COMMIT = "UPDATE commits SET number = number + 1"
_ANOTHER = (
    "set synthesize.journal to a different file or, in a task's recipe, `folder` to a different "
    "folder"
)
_ENDED = ("connection", "the process ended while it was in flight", 1)
"""Kind, reason, and attempts of a request that was in flight when a process ended."""


@dataclass
class Counts:
    """Number of answers and of transactions committed to a journal."""

    answers: int
    commits: int


def row_hash(values: tuple[Any, ...]) -> str:
    """The hash of a row: of all columns before the hash, except the number of a failure."""
    # SQLite stores a whole number in a REAL column as a float.
    same = [float(value) if isinstance(value, int) else value for value in values]
    return xxhash.xxh3_64_hexdigest(json.dumps(same, default=repr).encode())


def open_journal_file(
    path: Path, lock: IO[str]
) -> tuple[sqlite3.Connection, sqlite3.Connection, Counts]:
    """Open two connections to the journal, one to read and one to write; create it if missing.

    A damaged journal is set aside, and what can be read of it is copied to a new one, with a note.
    lock: the locked file next to it. Raises RunError.
    """
    _require_journal(path)
    try:
        existed = path.exists()
        with closing(_connect(path)) as connection:
            _check_version(connection, path)
            problem = _damage(connection) if existed else None
        if problem is not None:
            _recover(path, problem)
        reader, writer = _connect(path), _connect(path)
        counts = _note_missing(reader, lock, path, recovered=problem is not None)
        _settle_reservations(writer)
    except sqlite3.Error as error:
        raise unusable(path, error) from error
    return reader, writer, counts


def journal_damage(path: Path) -> str | None:
    """The first problem in a journal that no process is writing, without changing it, if any."""
    try:
        with closing(_read_only(path)) as connection:
            return _damage(connection)
    except sqlite3.Error as error:
        return str(error)


def lock_journal(path: Path) -> IO[str]:
    """Lock a file next to the journal for this process. Raises RunError."""
    for end in ("", "-wal", "-shm", ".lock"):
        file = path.with_name(f"{path.name}{end}")
        if file.exists() and not file.is_file():
            raise RunError(
                "a file of the journal should be here, but there is a folder or a device",
                where=file,
                fix=f"move it away, or {_ANOTHER}",
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        lock = os.fdopen(opened, "r+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(
            f"the journal cannot be written here: {error.strerror}", where=path, fix=_ANOTHER
        ) from error
    if not try_lock(lock):
        lock.close()
        raise RunError(
            "another process is writing this journal",
            where=path,
            fix=f"wait for it, or {_ANOTHER}",
        )
    return lock


def _require_journal(path: Path) -> None:
    """Raise RunError for a database that is not a journal, before anything is written to it."""
    if not path.is_file() or not path.stat().st_size:
        return
    tables, columns = [], set[tuple[str]]()
    with suppress(sqlite3.Error), closing(_read_only(path)) as connection:
        columns = {*connection.execute("SELECT name FROM pragma_table_info('answers')")}
        tables = [*connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    if tables and not {("key",), ("text",)} <= columns:
        raise RunError("this SQLite file is not a journal", where=path, fix=_ANOTHER)


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(os.fsencode(path))}?mode=ro", uri=True)


def unusable(path: Path, error: Exception) -> RunError:
    if "full" in str(error):
        fix = "free some disk space and repeat the command: committed answers are kept"
    else:
        fix = f"{_ANOTHER}; keep this file if it was a journal, since its answers were paid for"
    return RunError(f"the journal cannot be used: {error}", where=path, fix=fix)


def write_counts(lock: IO[str], counts: Counts) -> None:
    """Record the counts next to the journal. Losing them is harmless."""
    with suppress(OSError):  # one write, so that a kill leaves either the old counts or the new
        os.pwrite(lock.fileno(), f"{counts.answers:<20}{counts.commits:<20}".encode(), 0)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    """Upgrade a journal of an older format. Raises RunError for a newer format."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in range(VERSION + 1):
        raise RunError(
            f"the journal has format {version}, but this version of Stillhouse supports only "
            f"formats up to {VERSION}",
            where=path,
            fix=f"use a newer Stillhouse, or {_ANOTHER}",
        )
    connection.executescript(_SCHEMA)
    if version < VERSION:
        connection.execute("BEGIN IMMEDIATE")
        for table in TABLES:
            _add_hashes(connection, table)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")


def _add_hashes(connection: sqlite3.Connection, table: str) -> None:
    """Add hashes to the rows of a table from a journal without them."""
    columns = [column[1] for column in connection.execute(f"PRAGMA table_info({table})")]
    if "xxh3" not in columns:
        connection.execute(f"ALTER TABLE {table} ADD COLUMN xxh3 TEXT")
    rows = connection.execute(f"SELECT * FROM {table} WHERE xxh3 IS NULL").fetchall()
    hashes = [(row_hash(_hashed(table, row)), row[0]) for row in rows]
    connection.executemany(f"UPDATE {table} SET xxh3 = ? WHERE {columns[0]} = ?", hashes)


def _damage(connection: sqlite3.Connection) -> str | None:
    """The first problem in the pages or rows of a journal; None if it is sound.

    Reads the entire file each time a journal is opened, so that lost answers are reported before
    any request is sent. Timestamps cannot replace this, because a disk that returns wrong bytes
    does not change them.
    """
    try:
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            return str(found)
        if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            return None  # an older format without hashes, which is upgraded when opened
        for table, what in TABLES.items():
            for row in connection.execute(f"SELECT * FROM {table}"):
                if not _sound(table, row):
                    return f"{what} in it has changed"
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return str(error)
    return None


def _sound(table: str, row: tuple[Any, ...]) -> bool:
    return bool(row[-1] == row_hash(_hashed(table, row)))


def _hashed(table: str, row: tuple[Any, ...]) -> tuple[Any, ...]:
    """The columns that the row's hash covers."""
    return row[1:-1] if table == "failures" else row[:-1]


def _settle_reservations(writer: sqlite3.Connection) -> None:
    """Record requests that a killed process had sent as failures that may have been billed."""
    columns = "key, model, messages, cost, tokens, happened"
    rows = writer.execute(f"SELECT {columns} FROM reservations").fetchall()
    if not rows:
        return
    writer.execute("BEGIN IMMEDIATE")
    for key, model, messages, cost, tokens, happened in rows:
        values = (key, model, messages, *_ENDED, cost, tokens, happened)
        writer.execute(ADD_FAILURE, (*values, row_hash(values)))
    writer.execute("DELETE FROM reservations")
    writer.execute("COMMIT")
    costs = [row[3] for row in rows if row[3] is not None]
    usd = f"${sum(costs):,.2f}, " if costs else ""
    note(
        f"{len(rows):,} requests were in flight when a process ended: the most they can have cost "
        f"counts as spent ({usd}at most {sum(row[4] for row in rows):,} tokens)"
    )


def _note_missing(
    reader: sqlite3.Connection, lock: IO[str], path: Path, *, recovered: bool
) -> Counts:
    """Count what is in the journal, and report anything that was committed but is now missing.

    recovered: the journal was recovered, so its commits are counted anew.
    """
    ((answers,), (commits,)) = reader.execute(
        "SELECT count(*) FROM answers UNION ALL SELECT number FROM commits"
    )
    lock.seek(0)
    words = lock.read(64).split()
    before = Counts(*[int(word) if word.isdecimal() else 0 for word in [*words, "", ""][:2]])
    if before.answers > answers:
        lost = before.answers - answers
        note(f"{path} has lost {lost:,} of {before.answers:,} answers: they are requested again")
    elif before.commits > commits and not recovered:
        note(
            f"{path} has lost its last {before.commits - commits:,} writes: the possible cost of "
            "failed requests among them does not count in the budget"
        )
    counts = Counts(answers, commits)
    write_counts(lock, counts)
    return counts


# --- recovery ----------------------------------------------------------------------------------


def _recover(path: Path, problem: str) -> None:
    """Set a damaged journal aside, and copy every sound row to a new one."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    with closing(_connect(path)) as new, closing(sqlite3.connect(aside)) as old:
        _check_version(new, path)
        new.execute("BEGIN")
        answers = (row for row in _readable_answers(old) if _sound("answers", row))
        new.executemany(ADD_ANSWER, answers)
        for table in ("failures", "reservations"):
            rows = [r for r in _readable(old, f"SELECT * FROM {table}") if _sound(table, r)]
            if rows:
                marks = ", ".join("?" * len(rows[0]))
                new.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", rows)
        new.execute("COMMIT")
        ((kept,),) = new.execute("SELECT count(*) FROM answers")
        last = next(_readable(old, "SELECT max(number) FROM failures"), (0,))[0] or 0
        lost = last - new.execute("SELECT count(*) FROM failures").fetchone()[0]
    note(f"{path} was damaged ({problem}): {kept:,} answers are kept; the damaged file is {aside}")
    if lost > 0:
        note(
            f"{lost:,} failed requests in it are lost: their possible cost does not count in the "
            "budget"
        )


def _readable_answers(old: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """Read answers by ranges of their hexadecimal keys, so that a damaged page loses only the rows
    near it."""
    for prefix in (f"{number:03x}" for number in range(4096)):
        after = f"{int(prefix, 16) + 1:03x}" if prefix != "fff" else "g"
        where = f"key >= '{prefix}' AND key < '{after}'"
        yield from _readable(old, f"SELECT * FROM answers WHERE {where}")


def _readable(old: sqlite3.Connection, statement: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows up to the first that cannot be read."""
    with suppress(sqlite3.DatabaseError, UnicodeDecodeError):
        yield from old.execute(statement)
