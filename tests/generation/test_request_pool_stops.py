"""Errors that stop all requests, and the budget that is never exceeded."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from stillhouse.errors import EndpointError, RunError
from stillhouse.generation import request_pool as pool_module
from stillhouse.generation.budget import Budget, Price, Spending, worst_case
from stillhouse.generation.client import Client
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Request
from stillhouse.generation.request_pool import MOST_FAILURES, Pool
from stillhouse.teachers.http_link import Patience
from tests.generation.pools import KEY, QUICK, requests, run
from tests.generation.stub import Reply, Stub, error

pytestmark = pytest.mark.run


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (error(401, "bad key"), "rejects the key"),
        (error(403, "not for you"), "may not use the model"),
        (error(404, "no such model"), "has no model 'teacher'"),
        (error(429, "pay first", code="insufficient_quota"), "no credit left"),
        (error(402, "Insufficient Balance"), "no credit left"),
        (error(200, "key limit exceeded", code=403), "may not use the model"),
        (error(200, "pay first", code="insufficient_quota"), "no credit left"),
    ],
    ids=["401", "403", "404", "no credit", "402", "200 with 403", "200 and no credit"],
)
def test_a_permanent_error_stops_all_requests_immediately(
    journal: Journal, fault: Reply, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> float:
        raise AssertionError("the pool waits for another attempt")

    monkeypatch.setattr(Patience, "wait", never)
    with Stub(lambda number, payload: fault) as stub:
        with pytest.raises(EndpointError, match=expected) as caught:
            run(journal, stub, requests(stub, 500), concurrency=4)
        assert len(stub.payloads) <= 8
    assert caught.value.where == stub.url
    assert caught.value.fix


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a pool sends no more requests and waits, without a limit, for those in flight."""
    event, last_answers = threading.Event(), Pool._last_answers

    async def waits(pool: Pool, workers: list[asyncio.Task[None]]) -> None:
        event.set()
        await last_answers(pool, workers)

    monkeypatch.setattr(Pool, "_last_answers", waits)
    monkeypatch.setattr(pool_module, "GRACE", 600.0)
    return event


def test_an_answer_in_flight_arrives_after_a_permanent_error(
    journal: Journal, stopping: threading.Event
) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        if number == 1:
            return error(401, "revoked")
        return Reply(when=stopping.is_set)

    with Stub(script) as stub:
        asked = requests(stub, 40)
        with pytest.raises(EndpointError):
            run(journal, stub, asked, concurrency=2)
        assert len(stub.payloads) == 2
    assert journal.counts() == (1, 0)


@pytest.mark.parametrize("times", [1, 2])
def test_requests_in_flight_finish_unless_cancelled_twice(
    journal: Journal, times: int, stopping: threading.Event
) -> None:
    """The server answers after the first cancellation, or never if there is a second one."""
    released = threading.Event()

    async def whole(stub: Stub, asked: list[Request]) -> None:
        async with Client(stub.url, "teacher", timeout=60.0) as client:
            pool = Pool(client.send, journal, Budget(), concurrency=4, patience=QUICK)
            work = asyncio.create_task(pool.answer_all(asked))
            while len(stub.payloads) < 4:
                await asyncio.sleep(0.01)
            work.cancel()
            while not stopping.is_set():
                await asyncio.sleep(0.01)
            if times == 2:
                work.cancel()
            else:
                released.set()
            await work

    with Stub(lambda n, p: Reply(when=released.is_set)) as stub:
        asked = requests(stub, 40)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(asyncio.wait_for(whole(stub, asked), 50))
        assert len(stub.payloads) == 4
    assert journal.counts() == ((4, 0) if times == 1 else (0, 4))


def test_an_unreachable_server_is_an_error_after_several_failures(journal: Journal) -> None:
    with Stub() as stub:
        asked = requests(stub, 200)
    with pytest.raises(EndpointError, match="in a row failed"):
        run(journal, stub, asked, concurrency=32)
    assert {kind for _, kind, _ in journal.failures()} == {"connection"}


def test_rejected_prompts_do_not_stop_a_run_once_others_are_answered(journal: Journal) -> None:
    """Prompts that were rejected in an earlier run come last. The first two runs stop after too
    many rejected prompts; the third one begins with the others."""
    many = 2 * MOST_FAILURES

    def script(number: int, payload: dict[str, Any]) -> Reply:
        n = int(payload["messages"][0]["content"].split()[1])
        return error(400, "the prompt is too long") if n < many else Reply()

    with Stub(script) as stub:
        asked = requests(stub, many + 5)
        with pytest.raises(EndpointError, match="in a row failed"):
            run(journal, stub, asked, concurrency=1)
        assert len(stub.payloads) == MOST_FAILURES
        with pytest.raises(EndpointError):  # the other half of the rejected prompts comes first
            run(journal, stub, asked, concurrency=1)
        tally = run(journal, stub, asked, concurrency=1)
        assert (tally.answered, tally.failed) == (5, many)
        tally = run(journal, stub, asked, concurrency=1)
        assert (tally.answered, tally.failed) == (0, many)


def test_an_exhausted_daily_quota_is_not_waited_for(journal: Journal) -> None:
    with (
        Stub(lambda n, p: error(429, "per day", {"retry-after": "86400"})) as stub,
        pytest.raises(EndpointError, match=r"requests a pause of 86,400 s .*per day"),
    ):
        run(journal, stub, requests(stub, 3), concurrency=1)


def test_a_missing_key_is_reported_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(EndpointError, match="TEACHER_KEY is not set"):
        Client("http://127.0.0.1:1/v1", "teacher", key_env="TEACHER_KEY")


@pytest.mark.parametrize("key", ["sk-123…", "sk-1\nx-other: header"])
def test_a_key_that_cannot_be_valid_is_not_sent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(EndpointError, match="characters that an API key cannot have") as caught:
        Client("http://127.0.0.1:1/v1", "teacher", key_env="TEACHER_KEY")
    assert key not in str(caught.value)


def test_the_key_is_sent_and_removed_from_errors_that_repeat_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with Stub(lambda n, p: error(400, f"your key is {KEY}"), key=KEY) as stub:
        assert run(journal, stub, requests(stub, 1), key_env="TEACHER_KEY").failed == 1
    assert [reason for _, _, reason in journal.failures()] == ["HTTP 400: your key is [key]"]
    wrong = "sk-wrong-0987654321"
    monkeypatch.setenv("TEACHER_KEY", wrong)
    with Stub(key=KEY) as stub, pytest.raises(EndpointError) as caught:
        run(journal, stub, requests(stub, 1), key_env="TEACHER_KEY")
    assert wrong not in str(caught.value)
    assert "bearer [key]" in str(caught.value).lower()


def test_a_key_is_removed_from_a_message_before_the_message_is_truncated(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    body = ("x" * 290 + KEY + "y" * 300).encode()
    with Stub(lambda n, p: Reply(body=body), key=KEY) as stub:
        assert run(journal, stub, requests(stub, 1), key_env="TEACHER_KEY").failed == 1
    ((_, _, reason),) = journal.failures()
    assert "sk-very" not in reason
    assert "x[key]" in reason


def test_an_answer_that_repeats_the_key_is_kept_without_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    tokens = [{"token": KEY[:9], "logprob": -0.1}, {"token": KEY[9:], "logprob": -0.1}]
    thought = {"reasoning_content": f"The key is {KEY}."}
    reply = Reply(text=f"Bearer {KEY}!", message=thought, logprobs=tokens)
    with Stub(lambda n, p: reply, key=KEY) as stub:
        (asked,) = requests(stub, 1)
        run(journal, stub, [asked], key_env="TEACHER_KEY")
    answer = journal.get(asked.key)
    assert answer is not None
    assert (answer.text, answer.reasoning) == ("Bearer [key]!", "The key is [key].")
    assert answer.logprobs is None


def test_a_placeholder_key_is_not_removed_from_answers(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "EMPTY")
    with Stub(lambda n, p: Reply(text="The list is EMPTY."), key="EMPTY") as stub:
        (asked,) = requests(stub, 1)
        run(journal, stub, [asked], key_env="TEACHER_KEY")
    answer = journal.get(asked.key)
    assert answer is not None
    assert answer.text == "The list is EMPTY."


# --- the budget --------------------------------------------------------------------------------


def test_the_worst_case_of_a_request_bounds_its_tokens() -> None:
    text = "naïve 你好 " * 20
    asked = Request("local", "m", ({"role": "user", "content": text},), {"max_tokens": 50})
    worst = worst_case(asked, Price(input=2.0, output=8.0))
    assert worst.tokens >= len(text.encode()) + 50
    assert worst.usd == pytest.approx(((worst.tokens - 50) * 2 + 50 * 8) / 1e6)


def test_the_worst_case_of_a_request_includes_parameters_that_extend_the_prompt() -> None:
    plain = Request("local", "m", ({"role": "user", "content": "hi"},), {"max_tokens": 50})
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 4000}}]
    more = replace(plain, parameters={"max_tokens": 50, "tools": tools, "temperature": 0.5})
    assert worst_case(more, None).tokens >= worst_case(plain, None).tokens + 4000


@pytest.mark.parametrize("limit", ["usd", "tokens"])
def test_requests_in_flight_never_exceed_the_budget(journal: Journal, limit: str) -> None:
    """Every answer costs exactly its worst case, which is hardest for a budget."""
    price = Price(input=10.0, output=30.0)
    with Stub() as stub:
        asked = requests(stub, 60)
        worst = worst_case(asked[0], price)
        reply = Reply(usage=(worst.tokens - 20, 20), delay=0.02)
        stub.script = lambda number, payload: reply
        budget = Budget(
            max_usd=worst.usd * 7.5 if limit == "usd" else None,
            max_tokens=int(worst.tokens * 7.5) if limit == "tokens" else None,
        )
        tally = run(journal, stub, asked, concurrency=16, budget=budget, price=price)
        assert len(stub.payloads) == 7
    assert tally.answered == 7
    assert tally.out_of_budget
    assert budget.reserved == Spending()


def test_answers_below_their_worst_case_leave_room_for_more(journal: Journal) -> None:
    """The worst case of all requests exceeds the budget; their actual cost does not."""
    with Stub(lambda number, payload: Reply(usage=(10, 5), delay=0.01)) as stub:
        asked = requests(stub, 30)
        budget = Budget(max_tokens=worst_case(asked[0], None).tokens * 2 + 30 * 15)
        tally = run(journal, stub, asked, concurrency=16, budget=budget)
    assert tally.answered == 30
    assert not tally.out_of_budget


def test_an_answer_without_usage_counts_as_its_worst_case(journal: Journal) -> None:
    with Stub(lambda number, payload: Reply(usage=None)) as stub:
        (asked,) = requests(stub, 1)
        run(journal, stub, [asked], price=Price(1.0, 1.0), budget=(budget := Budget()))
    answer = journal.get(asked.key)
    assert answer is not None
    assert answer.cost is None
    assert budget.spent == worst_case(asked, Price(1.0, 1.0))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(journal: Journal, status: int) -> None:
    with Stub() as other:
        reply = Reply(status=status, body=b"", headers={"location": f"{other.url}/steal"})
        with Stub(lambda number, payload: reply) as stub:
            with pytest.raises(EndpointError, match="redirects to") as raised:
                run(journal, stub, requests(stub, 3), concurrency=1)
            assert len(stub.payloads) == 1
        assert not other.payloads
    assert other.url in str(raised.value)


def test_longer_answers_require_more_free_disk_space(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space that is enough for short answers is not enough once a long one has arrived."""
    monkeypatch.setattr(Pool, "_disk_free", lambda _: 4 << 20)
    with Stub(lambda number, payload: Reply(text="x" * 400_000)) as stub:
        with pytest.raises(RunError, match="almost full"):
            run(journal, stub, requests(stub, 40), concurrency=4)
        assert 1 <= len(stub.payloads) <= 8
    assert journal.counts()[0] == len(stub.payloads)


def test_requests_stop_before_the_disk_is_full(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten answers fit; those that are in flight at that point still arrive."""
    free = iter([1 << 30] * 10)
    monkeypatch.setattr(Pool, "_disk_free", lambda _: next(free, 1 << 19))
    with Stub() as stub:
        with pytest.raises(RunError, match="almost full"):
            run(journal, stub, requests(stub, 40))
        assert len(stub.payloads) == 10
    assert journal.counts() == (10, 0)
