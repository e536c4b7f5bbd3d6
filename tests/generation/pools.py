"""Requests to a stub server, and a pool that sends them."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillhouse.generation.budget import Budget, Price
from stillhouse.generation.client import Client
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Request
from stillhouse.generation.request_pool import Pool, Tally
from stillhouse.teachers.http_link import Patience
from tests.generation.stub import Reply, Script, Stub

QUICK = Patience(attempts=3, backoff=0.02)
KEY = "sk-very-secret-1234567890"


def requests(stub: Stub | str, count: int, **changes: Any) -> list[Request]:
    """`count` different requests. stub: the server or its URL."""
    url = stub if isinstance(stub, str) else stub.url
    first = Request(url, "teacher", (), {"max_tokens": 20, "temperature": 0.5})
    return [
        replace(first, messages=({"role": "user", "content": f"question {n}"},), **changes)
        for n in range(count)
    ]


def run(
    journal: Journal,
    stub: Stub | str,
    asked: list[Request],
    *,
    concurrency: int = 8,
    budget: Budget | None = None,
    price: Price | None = None,
    timeout: float = 60.0,
    key_env: str | None = None,
    patience: Patience = QUICK,
) -> Tally:
    async def whole() -> Tally:
        url = stub if isinstance(stub, str) else stub.url
        async with Client(url, "teacher", key_env=key_env, price=price, timeout=timeout) as client:
            pool = Pool(
                client.send,
                journal,
                budget or Budget(),
                concurrency=concurrency,
                price=price,
                patience=patience,
            )
            return await pool.answer_all(asked)

    return asyncio.run(whole())


def committed(journal: Path) -> int:
    """The number of answers in a journal, which another process may be writing; 0 without one."""
    try:
        with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def once(fault: Reply) -> Script:
    """The first request is answered with `fault`, and all others normally."""
    return lambda number, payload: fault if number == 0 else Reply()
