"""How long a pool waits, and how many requests it sends at once, in simulated time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from stillhouse.generation.budget import Budget
from stillhouse.generation.client import FailedAttempt
from stillhouse.generation.concurrency import AdaptiveLimit
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Request
from stillhouse.generation.request_pool import LONGEST_WAIT, Pool, Send, Tally
from stillhouse.teachers.http_link import PATIENCE, Patience
from tests.clocks import run_at_once
from tests.generation.pools import QUICK, requests

URL = "http://127.0.0.1:1/v1"


class Immediate(Journal):
    """A journal whose commits take no simulated time, however busy the machine is."""

    def _hand_over(self, statement: str, values: tuple[Any, ...]) -> Future[None]:
        commit = super()._hand_over(statement, values)
        wait([commit])
        return commit


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Immediate(tmp_path / "answers.sqlite") as opened:
        yield opened


def run(
    journal: Journal, send: Send, count: int, *, concurrency: int = 8, patience: Patience = QUICK
) -> tuple[Tally, float]:
    """Send `count` requests; return the tally, and the simulated seconds that they took."""

    async def whole() -> Tally:
        pool = Pool(send, journal, Budget(), concurrency=concurrency, patience=patience)
        return await pool.answer_all(requests(URL, count))

    return run_at_once(whole())


def too_many(wait: float | None = None) -> FailedAttempt:
    return FailedAttempt("rate_limit", "slow down", retry=True, wait=wait)


def test_a_slow_server_is_waited_for_as_long_as_it_answers_some_requests(journal: Journal) -> None:
    """The server gives one answer every 20 s, and says when to retry. All answers together take
    longer than the longest wait for a server that answers none."""
    next_one = 0.0

    async def ask(request: Request) -> Answer | FailedAttempt:
        nonlocal next_one
        now = asyncio.get_running_loop().time()
        if now < next_one:
            return too_many(next_one - now)
        next_one = now + 20
        return Answer("an answer")

    tally, seconds = run(journal, ask, 40, concurrency=32)
    assert (tally.answered, tally.failed) == (40, 0)
    assert seconds > LONGEST_WAIT


def test_a_server_without_answers_is_not_waited_for_forever(journal: Journal) -> None:
    async def ask(request: Request) -> Answer | FailedAttempt:
        await asyncio.sleep(1)
        return too_many(100.0)

    tally, seconds = run(journal, ask, 2)
    assert tally.failed == 2
    assert LONGEST_WAIT - 100 < seconds < LONGEST_WAIT + 100


def test_a_pause_requested_by_the_server_delays_all_requests(journal: Journal) -> None:
    sent: list[float] = []

    async def ask(request: Request) -> Answer | FailedAttempt:
        sent.append(asyncio.get_running_loop().time())
        return too_many(30.0) if len(sent) == 1 else Answer("an answer")

    run(journal, ask, 3, concurrency=1)
    assert len(sent) == 4
    assert sent[0] == 0
    assert all(at >= 30 for at in sent[1:])


def test_a_server_with_a_limit_is_neither_flooded_nor_starved(journal: Journal) -> None:
    """The server returns 429 beyond ten requests at once; every request is answered in the end."""
    at_once = refused = 0

    async def ask(request: Request) -> Answer | FailedAttempt:
        nonlocal at_once, refused
        if at_once >= 10:
            refused += 1
            return too_many()
        at_once += 1
        await asyncio.sleep(0.02)
        at_once -= 1
        return Answer("an answer")

    tally, _ = run(journal, ask, 200, concurrency=64)
    assert (tally.answered, tally.failed) == (200, 0)
    assert 0 < refused < 100


def test_requests_do_not_fail_in_the_queue_of_a_server_that_answers_one_at_a_time(
    journal: Journal,
) -> None:
    turn = asyncio.Lock()

    async def ask(request: Request) -> Answer | FailedAttempt:
        try:
            async with asyncio.timeout(120), turn:
                await asyncio.sleep(20)
        except TimeoutError:
            return FailedAttempt("timeout", "no answer in 120 s", retry=True, billed=True)
        return Answer("an answer")

    tally, _ = run(journal, ask, 200, concurrency=64, patience=PATIENCE)
    assert (tally.answered, tally.failed) == (200, 0)


def test_a_few_slow_answers_do_not_lower_the_limit() -> None:
    async def whole() -> None:
        limit = AdaptiveLimit(256)
        for _ in range(3):
            limit.answered()
            limit.answered()
            limit.timed_out(asyncio.get_running_loop().time())
        assert limit.limit == 16 + 6

    run_at_once(whole())


def test_the_limit_doubles_each_round_then_halves_once_per_burst_and_then_grows_slowly() -> None:
    async def whole() -> None:
        limit = AdaptiveLimit(256)
        assert limit.limit == 16
        for _ in range(16):
            limit.answered()
        assert limit.limit == 32
        await asyncio.sleep(1)
        sent = asyncio.get_running_loop().time()
        await asyncio.sleep(1)
        limit.throttled(sent, 0.0)
        limit.throttled(sent, 0.0)
        assert limit.limit == 16
        for _ in range(16):
            limit.answered()
        assert 16.9 < limit.limit < 17

    run_at_once(whole())
