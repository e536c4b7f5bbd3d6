"""A server that misbehaves: what is asked again, what is given up, and what stops everything."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import EndpointError
from stillhouse.synthesis import client as client_module
from stillhouse.synthesis import pool as pool_module
from stillhouse.synthesis.budget import Budget, Price, Spending, worst_case
from stillhouse.synthesis.client import Client, retry_after
from stillhouse.synthesis.journal import Journal
from stillhouse.synthesis.limit import AdaptiveLimit
from stillhouse.synthesis.link import OpenAILink
from stillhouse.synthesis.pool import HOPELESS_FAILURES, Patience, Pool, Tally
from stillhouse.synthesis.request import Answer, Request
from tests.synthesis.stub import Reply, Script, Stub, error

QUICK = Patience(attempts=3, backoff=0.02)
KEY = "sk-very-secret-1234567890"


@pytest.fixture(autouse=True, params=["http", "openai"])
def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault must look the same through either way to the server."""
    if request.param == "openai":
        monkeypatch.setattr(client_module, "HttpLink", OpenAILink)


def requests(stub: Stub, count: int, **changes: Any) -> list[Request]:
    first = Request(stub.url, "teacher", (), {"max_tokens": 20, "temperature": 0.5})
    return [
        replace(first, messages=({"role": "user", "content": f"question {n}"},), **changes)
        for n in range(count)
    ]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "answers.sqlite") as journal:
        yield journal


def run(
    journal: Journal,
    stub: Stub,
    asked: list[Request],
    *,
    concurrency: int = 8,
    budget: Budget | None = None,
    price: Price | None = None,
    timeout: float = 5.0,
    key_env: str | None = None,
    patience: Patience = QUICK,
) -> Tally:
    async def whole() -> Tally:
        async with Client(
            stub.url, "teacher", key_env=key_env, price=price, timeout=timeout
        ) as client:
            pool = Pool(
                client.ask,
                journal,
                budget or Budget(),
                concurrency=concurrency,
                price=price,
                patience=patience,
            )
            return await pool.answer_all(asked)

    return asyncio.run(whole())


def once(fault: Reply) -> Script:
    """The first request meets the fault, all others are answered."""
    return lambda number, payload: fault if number == 0 else Reply()


# --- what goes well ----------------------------------------------------------------------------


def test_an_answer_arrives_with_all_that_the_server_said(journal: Journal) -> None:
    logprobs = [{"token": "4", "logprob": -0.1, "top_logprobs": []}]
    reply = Reply(
        text="4",
        finish_reason="length",
        usage=(11, 7),
        message={"reasoning_content": "2 + 2"},
        logprobs=logprobs,
        delay=0.03,
    )
    with Stub(lambda number, payload: reply) as stub:
        (asked,) = requests(stub, 1)
        tally = run(journal, stub, [asked], price=Price(input=1.0, output=10.0))
        sent = stub.payloads[0]
    answer = journal.get(asked.key)
    assert answer is not None
    assert (answer.text, answer.finish_reason, answer.reasoning) == ("4", "length", "2 + 2")
    assert (answer.prompt_tokens, answer.completion_tokens) == (11, 7)
    assert answer.cost == pytest.approx((11 * 1 + 7 * 10) / 1e6)
    assert answer.seconds >= 0.03
    assert answer.logprobs == logprobs
    assert sent["messages"] == [{"role": "user", "content": "question 0"}]
    assert (sent["max_tokens"], sent["temperature"]) == (20, 0.5)
    assert tally.answered == 1
    assert tally.spent == Spending(18, answer.cost)


def test_an_unknown_price_stays_unknown(journal: Journal) -> None:
    with Stub() as stub:
        (asked,) = requests(stub, 1)
        tally = run(journal, stub, [asked])
    answer = journal.get(asked.key)
    assert answer is not None
    assert answer.cost is None
    assert tally.unpriced == 1


def test_nothing_is_bought_twice_in_a_run_or_across_runs(journal: Journal) -> None:
    with Stub(lambda number, payload: Reply(delay=0.02)) as stub:
        asked = requests(stub, 20)
        first = run(journal, stub, asked + asked)
        again = run(journal, stub, asked + requests(stub, 22)[20:])
        assert len(stub.payloads) == 22
    assert (first.answered, first.reused) == (20, 20)
    assert (again.answered, again.reused) == (2, 20)


def test_several_samples_of_a_prompt_are_several_requests(journal: Journal) -> None:
    with Stub() as stub:
        (asked,) = requests(stub, 1)
        tally = run(journal, stub, [replace(asked, sample=n) for n in range(3)])
    assert tally.answered == 3


def test_many_requests_are_on_their_way_at_once_but_no_more_than_asked(journal: Journal) -> None:
    with Stub(lambda number, payload: Reply(delay=0.2)) as stub:
        run(journal, stub, requests(stub, 150), concurrency=24)
        assert 20 <= stub.most_at_once <= 24


# --- what is asked again -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "billed"),
    [
        (error(429, "slow down"), False),
        (error(500, "oh"), False),
        (error(503, "loading the model"), False),
        (error(200, "slow down", code=429), False),
        (error(200, "upstream is down", code="502"), False),
        (Reply(how="hang"), True),
        (Reply(how="trickle"), True),
        (Reply(how="cut"), True),
    ],
    ids=["429", "500", "503", "200 with 429", "200 with 502", "hangs", "trickles", "is cut"],
)
def test_a_passing_fault_is_asked_again(journal: Journal, fault: Reply, billed: bool) -> None:
    with Stub(once(fault)) as stub:
        (asked,) = requests(stub, 1)
        tally = run(journal, stub, [asked], timeout=0.4)
        assert len(stub.payloads) == 2
    assert (tally.answered, tally.failed) == (1, 0)
    # What the provider may have billed without our seeing the answer counts as spent.
    assert tally.spent.tokens == 15 + (worst_case(asked, None).tokens if billed else 0)
    assert journal.billed_failures(asked.key)[1] == tally.spent.tokens - 15


def test_retry_after_is_obeyed(journal: Journal) -> None:
    fault = error(429, "slow down", {"retry-after": "0.5"})
    with Stub(once(fault)) as stub:
        started = time.monotonic()
        tally = run(journal, stub, requests(stub, 1))
        assert time.monotonic() - started >= 0.5
    assert tally.throttled == 1


def test_a_slow_server_is_waited_for_while_it_answers_anyone(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives one answer every 50 ms, and says when; the longest wait is much shorter than all."""
    monkeypatch.setattr(pool_module, "LONGEST_WAIT", 0.8)
    monkeypatch.setattr(pool_module, "LONGEST_BACKOFF", 0.1)
    next_one = [0.0]

    def script(number: int, payload: dict[str, Any]) -> Reply:
        now = time.monotonic()
        if now < next_one[0]:
            return error(429, "slow down", {"retry-after": f"{next_one[0] - now:.3f}"})
        next_one[0] = now + 0.05
        return Reply()

    with Stub(script) as stub:
        tally = run(journal, stub, requests(stub, 40), concurrency=32)
    assert (tally.answered, tally.failed) == (40, 0)


def test_a_server_that_answers_nobody_is_not_waited_for_for_ever(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LONGEST_WAIT", 0.6)
    with Stub(lambda n, p: error(429, "slow down", {"retry-after": "0.1"})) as stub:
        started = time.monotonic()
        tally = run(journal, stub, requests(stub, 2))
        assert 0.3 < time.monotonic() - started < 3
    assert tally.failed == 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_comes_in_three_forms(headers: dict[str, str], seconds: float | None) -> None:
    found = retry_after(headers)
    assert found == (None if seconds is None else pytest.approx(seconds, abs=120))


def test_retry_after_may_be_a_date() -> None:
    soon = formatdate(time.time() + 3600, usegmt=True)
    assert retry_after({"retry-after": soon}) == pytest.approx(3600.0, abs=120)


def test_a_server_that_goes_on_failing_is_given_up_with_its_reason(journal: Journal) -> None:
    with Stub(lambda number, payload: error(500, "out of memory")) as stub:
        tally = run(journal, stub, requests(stub, 2))
        assert len(stub.payloads) == 2 * QUICK.attempts
    assert tally.failed == 2
    assert [reason for _, _, reason in journal.failures()] == ["HTTP 500: out of memory"] * 2


def test_what_failed_is_asked_again_by_the_next_run(journal: Journal) -> None:
    broken = [True]
    with Stub(lambda n, p: error(500, "oh") if broken[0] else Reply()) as stub:
        asked = requests(stub, 3)
        assert run(journal, stub, asked).failed == 3
        broken[0] = False
        assert run(journal, stub, asked).answered == 3


# --- what is not asked again -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        (error(400, "the prompt is too long"), "refused", "HTTP 400: the prompt is too long"),
        (error(422, "no such parameter"), "refused", "HTTP 422: no such parameter"),
        (error(200, "no such thing", code="oops"), "invalid", "not a chat completion"),
        (Reply(body=b'{"choices": [{"mess'), "invalid", "not a chat completion"),
        (Reply(body=b'{"hello": 1}'), "invalid", "KeyError: 'choices'"),
        (Reply(body=b'{"choices": [{"text": "old"}]}'), "invalid", "KeyError: 'message'"),
    ],
    ids=[
        "400",
        "422",
        "200 with an error",
        "invalid JSON",
        "other JSON",
        "a completion that is no chat",
    ],
)
def test_a_fault_of_one_request_fails_it_alone_and_at_once(
    journal: Journal, fault: Reply, kind: str, reason: str
) -> None:
    with Stub(once(fault)) as stub:
        tally = run(journal, stub, requests(stub, 3), concurrency=1)
        assert len(stub.payloads) == 3
    assert (tally.answered, tally.failed) == (2, 1)
    ((_, found_kind, found_reason),) = journal.failures()
    assert found_kind == kind
    assert reason in found_reason


def test_a_refusal_in_its_own_field_is_text(journal: Journal) -> None:
    reply = Reply(message={"content": None, "refusal": "I cannot help with that."})
    with Stub(lambda number, payload: reply) as stub:
        (asked,) = requests(stub, 1)
        run(journal, stub, [asked])
    answer = journal.get(asked.key)
    assert answer is not None
    assert (answer.text, answer.finish_reason) == ("I cannot help with that.", "refusal")


ODD: dict[str, Any] = {
    "choices": [
        {
            "message": {"content": "4", "reasoning_content": ["2 + 2"]},
            "finish_reason": {"type": "stop"},
            "logprobs": "none",
        }
    ],
    "usage": {"prompt_tokens": 2**70, "completion_tokens": True},
}


def test_a_field_of_an_odd_kind_counts_as_not_given(journal: Journal) -> None:
    with Stub(once(Reply(body=json.dumps(ODD).encode()))) as stub:
        asked = requests(stub, 3)
        tally = run(journal, stub, asked, concurrency=1, price=Price(1.0, 1.0))
    assert (tally.answered, tally.failed) == (3, 0)
    answer = journal.get(asked[0].key)
    assert answer == Answer("4", seconds=answer.seconds if answer else 0.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, ""),
        ({"choices": [{"message": {}, "finish_reason": "content_filter"}]}, ""),
        ({"choices": []}, ""),
        (
            {"choices": [{"message": {"content": [{"type": "text", "text": "1"}, {"text": "2"}]}}]},
            "12",
        ),
    ],
    ids=["null", "nothing", "no choice", "parts"],
)
def test_an_answer_without_a_text_is_kept_and_not_bought_again(
    journal: Journal, change: dict[str, Any], text: str
) -> None:
    whole = {"usage": {"prompt_tokens": 9, "completion_tokens": 20}, **change}
    for choice in whole["choices"]:
        choice["message"]["reasoning_content"] = "hm"
    with Stub(lambda number, payload: Reply(body=json.dumps(whole).encode())) as stub:
        (asked,) = requests(stub, 1)
        assert run(journal, stub, [asked]).answered == 1
        assert run(journal, stub, [asked]).reused == 1
        assert len(stub.payloads) == 1
    answer = journal.get(asked.key)
    assert answer is not None
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == (text, 9, 20)
    assert answer.reasoning == ("hm" if whole["choices"] else None)


# --- what stops everything ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (error(401, "bad key"), "refuses the key"),
        (error(403, "not for you"), "may not use the model"),
        (error(404, "no such model"), "has no model 'teacher'"),
        (error(429, "pay first", code="insufficient_quota"), "no credit left"),
        (error(402, "Insufficient Balance"), "no credit left"),
        (error(200, "key limit exceeded", code=403), "may not use the model"),
        (error(200, "pay first", code="insufficient_quota"), "no credit left"),
    ],
    ids=["401", "403", "404", "no credit", "402", "200 with 403", "200 and no credit"],
)
def test_a_hopeless_fault_stops_at_once(journal: Journal, fault: Reply, expected: str) -> None:
    with Stub(lambda number, payload: fault) as stub:
        started = time.monotonic()
        with pytest.raises(EndpointError, match=expected) as caught:
            run(journal, stub, requests(stub, 500), concurrency=4)
        assert time.monotonic() - started < 3
        assert len(stub.payloads) <= 8
    assert caught.value.where == stub.url
    assert caught.value.fix


def test_an_answer_on_its_way_still_arrives_after_a_hopeless_fault(journal: Journal) -> None:
    with Stub(lambda n, p: error(401, "revoked") if n == 1 else Reply(delay=0.5)) as stub:
        asked = requests(stub, 40)
        with pytest.raises(EndpointError):
            run(journal, stub, asked, concurrency=2)
        assert len(stub.payloads) == 2
    assert journal.counts() == (1, 0)


@pytest.mark.parametrize("times", [1, 2])
def test_what_is_on_its_way_arrives_unless_it_is_cancelled_twice(
    journal: Journal, times: int
) -> None:
    async def whole(stub: Stub, asked: list[Request]) -> None:
        async with Client(stub.url, "teacher", timeout=5.0) as client:
            pool = Pool(client.ask, journal, Budget(), concurrency=4, patience=QUICK)
            work = asyncio.create_task(pool.answer_all(asked))
            while len(stub.payloads) < 4:
                await asyncio.sleep(0.01)
            began[0] = time.monotonic()
            for _ in range(times):
                work.cancel()
                await asyncio.sleep(0.1)
            await work

    began = [0.0]
    with Stub(lambda n, p: Reply(delay=1.5)) as stub:
        asked = requests(stub, 40)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(whole(stub, asked))
        seconds = time.monotonic() - began[0]
        assert len(stub.payloads) == 4
    assert journal.counts() == ((4, 0) if times == 1 else (0, 4))
    assert (seconds < 1.2) == (times == 2)


def test_a_server_that_is_not_there_stops_after_a_while(journal: Journal) -> None:
    with Stub() as stub:
        asked = requests(stub, 200)
    with pytest.raises(EndpointError, match="in a row were given up"):
        run(journal, stub, asked, concurrency=32)
    assert {kind for _, kind, _ in journal.failures()} == {"connection"}


def test_refused_prompts_stop_nothing_where_others_are_answered(journal: Journal) -> None:
    """Twice as many in a row as may fail; the others come after them, or before."""
    many = 2 * HOPELESS_FAILURES

    def script(number: int, payload: dict[str, Any]) -> Reply:
        n = int(payload["messages"][0]["content"].split()[1])
        return error(400, "the prompt is too long") if n < many else Reply()

    with Stub(script) as stub:
        asked = requests(stub, many + 5)
        with pytest.raises(EndpointError, match="in a row were given up"):
            run(journal, stub, asked, concurrency=1)
        assert len(stub.payloads) == HOPELESS_FAILURES
        with pytest.raises(EndpointError):  # the other refused ones come first now
            run(journal, stub, asked, concurrency=1)
        tally = run(journal, stub, asked, concurrency=1)
        assert (tally.answered, tally.failed) == (5, many)
        tally = run(journal, stub, asked, concurrency=1)
        assert (tally.reused, tally.failed) == (5, many)


def test_an_exhausted_daily_quota_is_not_waited_for(journal: Journal) -> None:
    with (
        Stub(lambda n, p: error(429, "per day", {"retry-after": "86400"})) as stub,
        pytest.raises(EndpointError, match="per day"),
    ):
        run(journal, stub, requests(stub, 3), concurrency=1)


def test_a_key_that_is_not_set_is_said_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(EndpointError, match="TEACHER_KEY is not set"):
        Client("http://127.0.0.1:1/v1", "teacher", key_env="TEACHER_KEY")


@pytest.mark.parametrize("key", ["sk-123…", "sk-1\nx-other: header"])
def test_a_key_that_can_be_none_is_not_sent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(EndpointError, match="characters that no key has") as caught:
        Client("http://127.0.0.1:1/v1", "teacher", key_env="TEACHER_KEY")
    assert key not in str(caught.value)


def test_a_base_url_that_is_none() -> None:
    with pytest.raises(EndpointError, match="not an http"):
        Client("127.0.0.1:8080/v1", "teacher")


def test_the_key_is_sent_and_appears_nowhere_even_where_the_server_repeats_it(
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


def test_a_key_across_the_end_of_what_is_kept_of_a_message_is_not_cut_into(
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


def test_a_placeholder_for_a_key_is_a_word_that_answers_may_hold(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "EMPTY")
    with Stub(lambda n, p: Reply(text="The list is EMPTY."), key="EMPTY") as stub:
        (asked,) = requests(stub, 1)
        run(journal, stub, [asked], key_env="TEACHER_KEY")
    answer = journal.get(asked.key)
    assert answer is not None
    assert answer.text == "The list is EMPTY."


# --- how many at once --------------------------------------------------------------------------


def test_the_limit_doubles_each_round_then_halves_once_a_burst_and_then_creeps() -> None:
    limit = AdaptiveLimit(256)
    assert limit.limit == 16
    for _ in range(16):
        limit.answered()
    assert limit.limit == 32
    sent = time.monotonic()
    limit.throttled(sent, 0.0)
    limit.throttled(sent, 0.0)
    assert limit.limit == 16
    for _ in range(16):
        limit.answered()
    assert 16.9 < limit.limit < 17


def test_a_server_with_a_limit_is_neither_flooded_nor_starved(journal: Journal) -> None:
    """It answers 429 beyond ten at once; every request is answered in the end."""
    stub: Stub

    def script(number: int, payload: dict[str, Any]) -> Reply:
        return error(429, "too many") if stub.now >= 10 else Reply(delay=0.02)

    with Stub(script) as stub:
        tally = run(journal, stub, requests(stub, 200), concurrency=64)
        refused = len(stub.payloads) - 200
    assert (tally.answered, tally.failed) == (200, 0)
    assert tally.throttled == refused
    assert refused < 100


# --- the budget --------------------------------------------------------------------------------


def test_the_worst_case_of_a_request_bounds_its_tokens() -> None:
    text = "naïve 你好 " * 20
    asked = Request("local", "m", ({"role": "user", "content": text},), {"max_tokens": 50})
    worst = worst_case(asked, Price(input=2.0, output=8.0))
    assert worst.tokens >= len(text.encode()) + 50
    assert worst.usd == pytest.approx(((worst.tokens - 50) * 2 + 50 * 8) / 1e6)


def test_the_worst_case_of_a_request_knows_what_its_parameters_put_into_the_prompt() -> None:
    plain = Request("local", "m", ({"role": "user", "content": "hi"},), {"max_tokens": 50})
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 4000}}]
    more = replace(plain, parameters={"max_tokens": 50, "tools": tools, "temperature": 0.5})
    assert worst_case(more, None).tokens >= worst_case(plain, None).tokens + 4000


@pytest.mark.parametrize("limit", ["usd", "tokens"])
def test_a_budget_is_never_passed_even_by_what_is_on_its_way(journal: Journal, limit: str) -> None:
    """Every answer takes exactly its worst case: the hardest for a budget."""
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


def test_cheap_answers_make_room_for_more(journal: Journal) -> None:
    """The worst case of all at once does not fit; what they really take does."""
    with Stub(lambda number, payload: Reply(usage=(10, 5), delay=0.01)) as stub:
        asked = requests(stub, 30)
        budget = Budget(max_tokens=worst_case(asked[0], None).tokens * 2 + 30 * 15)
        tally = run(journal, stub, asked, concurrency=16, budget=budget)
    assert tally.answered == 30
    assert not tally.out_of_budget


def test_an_answer_without_usage_counts_as_its_worst_case(journal: Journal) -> None:
    with Stub(lambda number, payload: Reply(usage=None)) as stub:
        (asked,) = requests(stub, 1)
        tally = run(journal, stub, [asked], price=Price(1.0, 1.0))
    answer = journal.get(asked.key)
    assert answer is not None
    assert answer.cost is None
    assert tally.spent == worst_case(asked, Price(1.0, 1.0))
