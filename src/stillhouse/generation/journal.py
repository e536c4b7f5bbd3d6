"""All answers that were paid for, in one SQLite file, each committed when it arrives.

One thread writes. It commits everything that arrived since its last commit as one transaction, so
that thousands of answers per second share a few disk flushes. The journal is in WAL mode with full
synchronization: committed answers survive a killed process and a power failure.

Only one process can open a journal at a time: two could pay for the same answer twice.
"""

from __future__ import annotations

import fcntl
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

from stillhouse.errors import RunError
from stillhouse.generation.request import Answer, Failure, Request

VERSION = 1
_MOST_IN_A_COMMIT = 1024
_MOST_WAITING = 8192
"""Rows that may wait for the writer; `record` blocks beyond that. Bounds memory."""

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
    arrived REAL NOT NULL
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
"""
# An answer that is there already stays: the journal never replaces what was paid for.
_ADD_ANSWER = f"INSERT OR IGNORE INTO answers VALUES ({', '.join('?' * 15)})"
_ADD_FAILURE = f"INSERT INTO failures VALUES (NULL, {', '.join('?' * 9)})"
_ANSWER = (
    "SELECT text, finish_reason, reasoning, prompt_tokens, completion_tokens, cost, seconds, "
    "logprobs FROM answers WHERE key = ?"
)
_BILLED_FAILURES = "SELECT sum(cost), sum(tokens) FROM failures WHERE key = ?"
_COUNTS = "SELECT count(*) FROM answers UNION ALL SELECT count(*) FROM failures"


@dataclass(frozen=True)
class _Row:
    statement: str
    values: tuple[Any, ...]
    done: Future[None]


class Journal:
    """Opens or creates the journal at `path`. Use it as a context manager.

    Raises RunError: another process has it open, it is damaged, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_file = _locked(path)
        try:
            self._reader, self._writer = _open(path), _open(path)
        except BaseException:
            self._lock_file.close()
            raise
        self._reading = threading.Lock()
        self._arrived: queue.Queue[_Row | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commits everything that was recorded, then closes the file."""
        self._arrived.put(None)
        self._thread.join()
        self._reader.close()
        self._lock_file.close()

    def record(self, request: Request, answer: Answer) -> Future[None]:
        """Commits an answer; the future is done when it is on disk, and raises RunError if that
        fails."""
        logprobs: Any = None if answer.logprobs is None else _json(answer.logprobs)
        values = (
            request.key,
            request.endpoint,
            request.model,
            _json(list(request.messages)),
            _json(dict(request.parameters)),
            request.sample,
            *vars(replace(answer, logprobs=logprobs)).values(),  # the table has their order
            time.time(),
        )
        return self._hand_over(_ADD_ANSWER, values)

    def record_failure(self, request: Request, failure: Failure) -> Future[None]:
        """Commits why a request has no answer, as `record` does. Later runs send it again."""
        messages = _json(list(request.messages))
        values = (request.key, request.model, messages, *vars(failure).values(), time.time())
        return self._hand_over(_ADD_FAILURE, values)

    def get(self, key: str) -> Answer | None:
        """The committed answer to the request with this key."""
        row = next(iter(self._rows(_ANSWER, key)), None)
        if row is None:
            return None
        answer = Answer(*row)
        return answer if row[-1] is None else replace(answer, logprobs=json.loads(row[-1]))

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys (a few hundred) that have a committed answer."""
        return self._among(keys, "answers")

    def refused(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys (a few hundred) that an endpoint has refused to answer."""
        return self._among(keys, "failures", "AND kind = 'refused'")

    def _among(self, keys: Sequence[str], table: str, condition: str = "") -> set[str]:
        marks = ", ".join("?" * len(keys))
        statement = f"SELECT key FROM {table} WHERE key IN ({marks}) {condition}"
        return {key for (key,) in self._rows(statement, *keys)}

    def billed_failures(self, key: str) -> tuple[float, int]:
        """Dollars and tokens that may have been billed for lost answers to this request."""
        ((cost, tokens),) = self._rows(_BILLED_FAILURES, key)
        return cost or 0.0, tokens or 0

    def counts(self) -> tuple[int, int]:
        """How many answers and how many failures are committed."""
        ((answers,), (failures,)) = self._rows(_COUNTS)
        return answers, failures

    def failures(self) -> list[tuple[str, str, str]]:
        """Key, kind and reason of every failure, oldest first."""
        return self._rows("SELECT key, kind, reason FROM failures ORDER BY number")

    def _rows(self, statement: str, *values: str) -> list[Any]:
        with self._reading:
            return self._reader.execute(statement, values).fetchall()

    # --- the writer's thread -----------------------------------------------------------------

    def _hand_over(self, statement: str, values: tuple[Any, ...]) -> Future[None]:
        row = _Row(statement, tuple(map(_storable, values)), Future())
        row.done.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it
        self._arrived.put(row)
        return row.done

    def _write(self) -> None:
        with closing(self._writer) as connection:
            closing_down = False
            while not closing_down:
                taken = self._take()
                closing_down = None in taken
                _commit(connection, [row for row in taken if row is not None], self.path)

    def _take(self) -> list[_Row | None]:
        """Waits for a row; takes all that have arrived."""
        taken = [self._arrived.get()]
        while len(taken) < _MOST_IN_A_COMMIT:
            try:
                taken.append(self._arrived.get_nowait())
            except queue.Empty:
                break
        return taken


def _commit(connection: sqlite3.Connection, rows: Iterable[_Row], path: Path) -> None:
    """Commits the rows in one transaction, and resolves their futures.

    A row with values that the database rejects fails alone.
    """
    rows = list(rows)
    try:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for row in rows:
                connection.execute(row.statement, row.values)
    # Every exception: if this thread ended, callers would wait forever.
    except Exception as error:
        if len(rows) > 1 and not isinstance(error, sqlite3.OperationalError):
            for row in rows:
                _commit(connection, [row], path)
            return
        for row in rows:
            row.done.set_exception(_unusable(path, error))
    else:
        for row in rows:
            row.done.set_result(None)


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _storable(value: Any) -> Any:
    """Replaces halves of surrogate pairs, which JSON allows and SQLite does not."""
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-8", "replace").decode()


# --- opening -----------------------------------------------------------------------------------


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = _connect(path)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            connection.close()
            raise RunError(
                f"this journal has format {version}; this Stillhouse writes format {VERSION}",
                where=path,
                fix="use a newer Stillhouse, or give another file as synthesize.journal",
            )
        connection.executescript(_SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    return connection


def _locked(path: Path) -> IO[str]:
    """Locks a file beside the journal for this process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("a", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"the journal cannot be written here: {error.strerror}",
            where=path,
            fix="give another file as synthesize.journal",
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


def _unusable(path: Path, error: Exception) -> RunError:
    if "full" in str(error):
        fix = "free some disk space and repeat the command: committed answers are kept"
    else:
        fix = (
            "give another file as synthesize.journal, and keep this one: its answers were paid for"
        )
    return RunError(f"the journal cannot be used: {error}", where=path, fix=fix)
