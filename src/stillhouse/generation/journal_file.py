"""The file of a journal: opened, checked, and recovered where it is damaged.

SQLite notices damaged pages, but not a changed letter inside an answer: each row has a hash of its
values. The lock file beside the journal holds the number of committed answers, because SQLite drops
a damaged write-ahead log without a word.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any

import xxhash

from stillhouse.data.data_files import regular_if_there
from stillhouse.errors import RunError
from stillhouse.progress import note

VERSION = 2

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
    happened REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS failures_by_key ON failures (key);
CREATE TABLE IF NOT EXISTS reservations (
    key TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    messages TEXT NOT NULL,
    cost REAL,
    tokens INTEGER NOT NULL,
    happened REAL NOT NULL
) WITHOUT ROWID;
"""
# Requests that were on their way when a process ended may have been billed.
_SETTLE = """
INSERT INTO failures
    SELECT NULL, key, model, messages, 'connection', 'the process ended while it was in flight', 1,
        cost, tokens, happened
    FROM reservations;
DELETE FROM reservations;
"""
ADD_ANSWER = f"INSERT OR IGNORE INTO answers VALUES ({', '.join('?' * 16)})"
ADD_FAILURE = f"INSERT INTO failures VALUES (NULL, {', '.join('?' * 9)})"
ADD_RESERVATION = "INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?, ?)"


def row_hash(values: tuple[Any, ...]) -> str:
    """Of an answer's row, all columns before the hash."""
    # SQLite stores a whole number in a REAL column as a float.
    same = [float(value) if isinstance(value, int) else value for value in values]
    return xxhash.xxh3_64_hexdigest(json.dumps(same, default=repr).encode())


def open_journal_file(path: Path, lock: IO[str]) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    """Two connections to the journal, one to read and one to write; makes it where there is none.

    A damaged journal is set aside, and what can be read of it is copied to a new one, with a note.
    lock: the locked file beside it. Raises RunError.
    """
    try:
        existed = path.exists()
        with closing(_connect(path)) as connection:
            _check_version(connection, path)
            problem = _damage(connection) if existed else None
        if problem is not None:
            _recover(path, problem)
        reader, writer = _connect(path), _connect(path)
        _settle_reservations(writer)
        _note_missing(reader, lock, path)
    except sqlite3.Error as error:
        raise unusable(path, error) from error
    return reader, writer


def journal_damage(path: Path) -> str | None:
    """The first thing that is wrong with a journal that no process is writing; changes nothing."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return _damage(connection)
    except sqlite3.Error as error:
        return str(error)


def lock_journal(path: Path) -> IO[str]:
    """Locks a file beside the journal for this process. Raises RunError."""
    regular_if_there(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(
            f"the journal cannot be written here: {error.strerror}",
            where=path,
            fix="set synthesize.journal to another file",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunError(
            "another process is writing this journal",
            where=path,
            fix="wait for it, or give this run its own journal: synthesize.journal",
        ) from None
    return lock


def unusable(path: Path, error: Exception) -> RunError:
    if "full" in str(error):
        fix = "free some disk space and repeat the command: committed answers are kept"
    else:
        fix = "set synthesize.journal to another file, and keep this one: its answers were paid for"
    return RunError(f"the journal cannot be used: {error}", where=path, fix=fix)


def write_count(lock: IO[str], answers: int) -> None:
    """Records beside the journal how many answers it has. A loss of this is harmless."""
    with suppress(OSError):
        lock.seek(0)
        lock.truncate()
        lock.write(str(answers))
        lock.flush()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    """Raises RunError for a journal of a later format; brings an older one to this format."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in range(VERSION + 1):
        raise RunError(
            f"this journal has format {version}; this Stillhouse writes format {VERSION}",
            where=path,
            fix="use a newer Stillhouse, or set synthesize.journal to another file",
        )
    connection.executescript(_SCHEMA)
    columns = [column[1] for column in connection.execute("PRAGMA table_info(answers)")]
    if "xxh3" not in columns:
        connection.execute("ALTER TABLE answers ADD COLUMN xxh3 TEXT")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _damage(connection: sqlite3.Connection) -> str | None:
    """The first thing that is wrong with the pages or rows of a journal."""
    try:
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            return str(found)
        for row in connection.execute("SELECT * FROM answers"):
            if not _sound(row):
                return "an answer in it has changed"
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return str(error)
    return None


def _sound(row: tuple[Any, ...]) -> bool:
    return row[-1] is None or row[-1] == row_hash(row[:-1])


def _settle_reservations(writer: sqlite3.Connection) -> None:
    """Counts the requests that a killed process had sent as failures that may have been billed."""
    sums = "SELECT count(*), sum(cost), sum(tokens) FROM reservations"
    ((count, cost, tokens),) = writer.execute(sums)
    if count:
        writer.executescript(f"BEGIN; {_SETTLE} COMMIT")
        usd = "" if cost is None else f"${cost:,.2f}, "
        note(
            f"{count:,} requests were in flight when a process ended: what they may have cost "
            f"counts as spent ({usd}at most {tokens:,} tokens)"
        )


def _note_missing(reader: sqlite3.Connection, lock: IO[str], path: Path) -> None:
    """Notes how many answers are gone that were committed before."""
    ((count,),) = reader.execute("SELECT count(*) FROM answers")
    lock.seek(0)
    text = lock.read(32).strip()
    recorded = int(text) if text.isdecimal() else 0
    if recorded > count:
        lost = recorded - count
        note(f"{path} has lost {lost:,} of {recorded:,} answers: they are requested again")
    write_count(lock, count)


# --- recovery ----------------------------------------------------------------------------------


def _recover(path: Path, problem: str) -> None:
    """Sets a damaged journal aside, and copies every sound row to a new one."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    with closing(_connect(path)) as new, closing(sqlite3.connect(aside)) as old:
        _check_version(new, path)
        new.execute("BEGIN")
        new.executemany(ADD_ANSWER, (row for row in _readable_answers(old) if _sound(row)))
        for table in ("failures", "reservations"):
            rows = list(_readable(old, f"SELECT * FROM {table}"))
            if rows:
                marks = ", ".join("?" * len(rows[0]))
                new.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", rows)
        new.execute("COMMIT")
        ((kept,),) = new.execute("SELECT count(*) FROM answers")
    note(f"{path} was damaged ({problem}): {kept:,} answers are kept; the damaged file is {aside}")


def _readable_answers(old: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """By ranges of their keys, which are hexadecimal: a damaged page costs the rows near it."""
    for prefix in (f"{number:03x}" for number in range(4096)):
        after = f"{int(prefix, 16) + 1:03x}" if prefix != "fff" else "g"
        where = f"key >= '{prefix}' AND key < '{after}'"
        yield from _readable(old, f"SELECT * FROM answers WHERE {where}")


def _readable(old: sqlite3.Connection, statement: str) -> Iterator[tuple[Any, ...]]:
    """The rows up to the first that cannot be read."""
    with suppress(sqlite3.DatabaseError, UnicodeDecodeError):
        yield from old.execute(statement)
