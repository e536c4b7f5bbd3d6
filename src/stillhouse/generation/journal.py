"""Keeps all answers that were paid for in one SQLite file, each committed when it arrives.

A single thread writes. It commits everything that arrived since its last commit in one transaction,
so that thousands of answers per second share a few disk flushes. The journal is in WAL mode with
full synchronization, so committed answers survive a killed process and a power failure.

Only one process can open a journal at a time, because two could pay for the same answer twice.
"""

from __future__ import annotations

import json
import queue
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from stillhouse.generation.budget import Spending
from stillhouse.generation.journal_file import (
    ADD_ANSWER,
    ADD_FAILURE,
    ADD_RESERVATION,
    COUNT_COMMIT,
    lock_journal,
    open_journal_file,
    row_hash,
    unusable,
    write_counts,
)
from stillhouse.generation.request import Answer, Failure, Request

_MOST_IN_A_COMMIT = 1024
_MOST_WAITING = 8192
"""Maximum rows that wait for the writer, which bounds memory; `record` blocks beyond that."""

_RELEASE = "DELETE FROM reservations WHERE key = ?"
_ANSWER = (
    "SELECT text, finish_reason, reasoning, prompt_tokens, completion_tokens, cost, seconds{} "
    "FROM answers WHERE key = ?"
)
_BILLED_FAILURES = "SELECT sum(tokens), sum(cost) FROM failures WHERE key = ?"
_COUNTS = "SELECT count(*) FROM answers UNION ALL SELECT count(*) FROM failures"


@dataclass(frozen=True)
class _Row:
    """A row to write. values: of the statement, starting with the request's key."""

    statement: str
    values: tuple[Any, ...]
    done: Future[None]


class Journal:
    """The journal at `path`, opened or created. Use it as a context manager.

    Raises RunError if another process has it open, or it cannot be used or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.largest_row = 0  # in characters, among the rows recorded since it was opened
        self._reading = threading.Lock()
        self._lock_file = lock_journal(path)
        try:
            opened = open_journal_file(path, self._lock_file)
            self._reader, self._writer, self._counts = opened
        except BaseException:
            self._lock_file.close()
            raise
        self._arrived: queue.Queue[_Row | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit everything that was recorded, then close the file."""
        self._arrived.put(None)
        self._thread.join()
        self._reader.close()
        self._lock_file.close()

    def record(self, request: Request, answer: Answer) -> Future[None]:
        """Commit an answer. The future is done when it is on disk; it may raise RunError."""
        logprobs: Any = None if answer.logprobs is None else _json(answer.logprobs)
        values = (
            request.key,
            request.endpoint,
            request.model,
            _json(list(request.messages)),
            _json(dict(request.parameters)),
            request.sample,
            *vars(replace(answer, logprobs=logprobs)).values(),  # in the order of the table
            time.time(),
        )
        return self._add(ADD_ANSWER, values)

    def record_failure(self, request: Request, failure: Failure) -> Future[None]:
        """Commit why a request has no answer, like `record`. Later runs send it again.

        Both an answer and a failure release what was reserved for the request.
        """
        messages = _json(list(request.messages))
        values = (request.key, request.model, messages, *vars(failure).values(), time.time())
        return self._add(ADD_FAILURE, values)

    def reserve(self, request: Request, cost: float | None, tokens: int) -> Future[None]:
        """Commit the most that a request can cost, before it is sent.

        If the process ends before the request is recorded or released, this amount counts as
        billed.
        """
        values = (request.key, request.model, _json(list(request.messages)), cost, tokens)
        return self._add(ADD_RESERVATION, (*values, time.time()))

    def release(self, request: Request) -> Future[None]:
        """Delete the reservation of a request that was not sent."""
        return self._hand_over(_RELEASE, (request.key,))

    def get(self, key: str, *, logprobs: bool = True) -> Answer | None:
        """The committed answer to the request with this key; None if there is none.

        logprobs: False leaves them out: with alternatives, they are a thousand times as long as the
        text.
        """
        row = next(iter(self._rows(_ANSWER.format(", logprobs" if logprobs else ""), key)), None)
        if row is None:
            return None
        answer = Answer(*row)
        return replace(answer, logprobs=_logprobs(row[-1])) if logprobs else answer

    def known(self, keys: Sequence[str]) -> set[str]:
        """The subset of the keys (a few hundred) that have a committed answer."""
        return self._among(keys, "answers")

    def refused(self, keys: Sequence[str]) -> set[str]:
        """The subset of the keys (a few hundred) that an endpoint has refused to answer."""
        return self._among(keys, "failures", "AND kind = 'refused'")

    def _among(self, keys: Sequence[str], table: str, condition: str = "") -> set[str]:
        marks = ", ".join("?" * len(keys))
        statement = f"SELECT key FROM {table} WHERE key IN ({marks}) {condition}"
        return {key for (key,) in self._rows(statement, *keys)}

    def billed_failures(self, key: str) -> Spending:
        """What may have been billed for lost answers to this request."""
        ((tokens, usd),) = self._rows(_BILLED_FAILURES, key)
        return Spending(tokens or 0, usd or 0.0)

    def counts(self) -> tuple[int, int]:
        """Number of committed answers and of committed failures."""
        ((answers,), (failures,)) = self._rows(_COUNTS)
        return answers, failures

    def failures(self) -> list[tuple[str, str, str]]:
        """Key, kind, and reason of every failure, oldest first."""
        return self._rows("SELECT key, kind, reason FROM failures ORDER BY number")

    def _rows(self, statement: str, *values: str) -> list[Any]:
        try:
            with self._reading:
                return self._reader.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise unusable(self.path, error) from error

    # --- the writer's thread -----------------------------------------------------------------

    def _add(self, statement: str, values: tuple[Any, ...]) -> Future[None]:
        """Insert a row with its hash."""
        stored = _storable(*values)
        return self._hand_over(statement, (*stored, row_hash(stored)))

    def _hand_over(self, statement: str, values: tuple[Any, ...]) -> Future[None]:
        size = sum(len(value) for value in values if isinstance(value, str))
        self.largest_row = max(self.largest_row, size)
        row = _Row(statement, values, Future())
        row.done.set_running_or_notify_cancel()  # so that waiting callers cannot cancel it
        self._arrived.put(row)
        return row.done

    def _write(self) -> None:
        with closing(self._writer) as connection:
            closing_down = False
            while not closing_down:
                taken = self._take()
                closing_down = None in taken
                rows = [row for row in taken if row is not None]
                if rows:
                    self._commit(connection, rows)

    def _commit(self, connection: sqlite3.Connection, rows: Sequence[_Row]) -> None:
        """Commit the rows in one transaction, count them, and resolve their futures.

        A row with values that the database rejects fails alone.
        """
        answers = 0
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                for row in rows:
                    done = connection.execute(row.statement, row.values)
                    answers += done.rowcount if row.statement is ADD_ANSWER else 0
                    if row.statement is not ADD_RESERVATION:
                        connection.execute(_RELEASE, row.values[:1])
                connection.execute(COUNT_COMMIT)
        # Catch everything: if this thread ended, callers would wait forever.
        except Exception as error:
            if len(rows) > 1 and not isinstance(error, sqlite3.OperationalError):
                for row in rows:
                    self._commit(connection, [row])
                return
            for row in rows:
                row.done.set_exception(unusable(self.path, error))
            return
        self._counts.answers += answers
        self._counts.commits += 1
        write_counts(self._lock_file, self._counts)
        for row in rows:
            row.done.set_result(None)

    def _take(self) -> list[_Row | None]:
        """Wait for a row; return all rows that have arrived."""
        taken = [self._arrived.get()]
        with suppress(queue.Empty):
            while len(taken) < _MOST_IN_A_COMMIT:
                taken.append(self._arrived.get_nowait())
        return taken


def _logprobs(stored: str | None) -> list[Any] | None:
    """Decode stored log-probabilities; None if there are none or, in an old journal without hashes,
    if they are something else."""
    try:
        found = json.loads(stored or "null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _storable(*values: Any) -> tuple[Any, ...]:
    """Replace halves of surrogate pairs, which JSON allows and SQLite does not."""
    return tuple(
        value.encode("utf-8", "replace").decode()
        if isinstance(value, str) and not value.isascii()
        else value
        for value in values
    )
