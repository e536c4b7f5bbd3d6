"""Requests to a server that misbehaves: which are sent again, and which fail."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from stillhouse.generation import client as client_module
from stillhouse.generation.budget import Budget, Price, Spending, worst_case
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Request
from stillhouse.teachers import http_link
from stillhouse.teachers.http_link import retry_after
from tests.clocks import Clock
from tests.generation.pools import QUICK, once, requests, run
from tests.generation.stub import Reply, Stub, error

pytestmark = pytest.mark.run


# --- successful requests -----------------------------------------------------------------------


def test_an_answer_has_all_fields_of_the_reply(journal: Journal) -> None:
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
        budget, price = Budget(), Price(input=1.0, output=10.0)
        tally = run(journal, stub, [asked], price=price, budget=budget)
        sent = stub.payloads[0]
    answer = journal.get(asked.key)
    assert answer is not None
    assert (answer.text, answer.finish_reason, answer.reasoning) == ("4", "length", "2 + 2")
    assert (answer.prompt_tokens, answer.completion_tokens) == (11, 7)
    assert answer.cost is not None
    assert answer.cost == pytest.approx((11 * 1 + 7 * 10) / 1e6)
    assert answer.seconds >= 0.03
    assert answer.logprobs == logprobs
    assert sent["messages"] == [{"role": "user", "content": "question 0"}]
    assert (sent["max_tokens"], sent["temperature"]) == (20, 0.5)
    assert tally.answered == 1
    assert budget.spent == Spending(18, answer.cost)


def test_tokens_that_only_the_total_includes_are_counted(journal: Journal) -> None:
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 518}
    whole = {"choices": [{"message": {"content": "4"}}], "usage": usage}
    with Stub(lambda number, payload: Reply(body=json.dumps(whole).encode())) as stub:
        (asked,) = requests(stub, 1)
        run(journal, stub, [asked], price=Price(input=1.0, output=10.0))
    answer = journal.get(asked.key)
    assert answer is not None
    assert (answer.prompt_tokens, answer.completion_tokens) == (11, 507)
    assert answer.cost == pytest.approx((11 * 1 + 507 * 10) / 1e6)


def test_the_cost_of_an_answer_is_unknown_without_a_price(journal: Journal) -> None:
    with Stub() as stub:
        (asked,) = requests(stub, 1)
        run(journal, stub, [asked])
    answer = journal.get(asked.key)
    assert answer is not None
    assert answer.cost is None


def test_no_answer_is_paid_for_twice_in_a_run_or_across_runs(journal: Journal) -> None:
    with Stub(lambda number, payload: Reply(delay=0.02)) as stub:
        asked = requests(stub, 20)
        first = run(journal, stub, asked + asked)
        again = run(journal, stub, asked + requests(stub, 22)[20:])
        assert len(stub.payloads) == 22
    assert (first.answered, again.answered) == (20, 2)


def test_samples_of_the_same_prompt_are_separate_requests(journal: Journal) -> None:
    with Stub() as stub:
        (asked,) = requests(stub, 1)
        tally = run(journal, stub, [replace(asked, sample=n) for n in range(3)])
    assert tally.answered == 3


def test_requests_in_flight_reach_but_never_exceed_the_concurrency(journal: Journal) -> None:
    """There are 16 at first, and one more with each answer."""
    stub: Stub

    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(when=lambda: number < 16 or stub.most_at_once >= 24, delay=0.05)

    with Stub(script) as stub:
        run(journal, stub, requests(stub, 150), concurrency=24)
        assert stub.most_at_once == 24


def test_a_kill_loses_no_more_answers_than_were_in_flight(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker's next request waits until its last answer is committed, even if that is slow."""
    committed: list[str] = []
    not_committed: list[int] = []
    record = journal.record

    def slowly(request: Request, answer: Answer) -> Future[None]:
        done: Future[None] = Future()

        def finish() -> None:
            committed.append(request.key)
            done.set_result(None)

        record(request, answer).add_done_callback(lambda _: threading.Timer(0.03, finish).start())
        return done

    def script(number: int, payload: dict[str, Any]) -> Reply:
        not_committed.append(number + 1 - len(committed))
        return Reply()

    monkeypatch.setattr(journal, "record", slowly)
    with Stub(script) as stub:
        run(journal, stub, requests(stub, 40), concurrency=4)
    assert max(not_committed) <= 4


# --- requests that are sent again --------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "billed"),
    [
        (error(429, "slow down"), False),
        (error(500, "oh"), False),
        (error(503, "loading the model"), False),
        (error(200, "slow down", code=429), False),
        (error(200, "upstream is down", code="502"), False),
        (Reply(how="cut"), True),
    ],
    ids=["429", "500", "503", "200 with 429", "200 with 502", "is cut"],
)
def test_a_request_is_retried_after_a_temporary_failure(
    journal: Journal, fault: Reply, billed: bool
) -> None:
    with Stub(once(fault)) as stub:
        (asked,) = requests(stub, 1)
        tally = run(journal, stub, [asked], budget=(budget := Budget()))
        assert len(stub.payloads) == 2
    assert (tally.answered, tally.failed) == (1, 0)
    # An answer that was not received, but that the provider may have billed, counts as spent.
    assert budget.spent.tokens == 15 + (worst_case(asked, None).tokens if billed else 0)
    assert journal.billed_failures(asked.key).tokens == budget.spent.tokens - 15


@pytest.mark.parametrize("how", ["hang", "trickle"])
def test_a_request_is_retried_if_the_answer_never_ends(
    journal: Journal, how: Literal["hang", "trickle"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first timeout expires as soon as the server has the request, and the others never do."""
    limits: list[float] = []

    @asynccontextmanager
    async def timeout(seconds: float) -> AsyncIterator[None]:
        limits.append(seconds)
        if len(limits) > 1:
            yield
            return
        task = asyncio.current_task()
        assert task is not None
        watching = asyncio.create_task(cancel_when_received(task))
        try:
            yield
        except asyncio.CancelledError:
            task.uncancel()
            raise TimeoutError from None
        finally:
            watching.cancel()

    async def cancel_when_received(task: asyncio.Task[Any]) -> None:
        while not stub.payloads:
            await asyncio.sleep(0.01)
        task.cancel()

    monkeypatch.setattr(client_module, "asyncio", SimpleNamespace(timeout=timeout))
    with Stub(once(Reply(how=how))) as stub:
        (asked,) = requests(stub, 1)
        tally = run(journal, stub, [asked], timeout=7.0, budget=(budget := Budget()))
        assert len(stub.payloads) == 2
    assert limits == [7.0, 7.0]
    assert (tally.answered, tally.failed) == (1, 0)
    assert budget.spent.tokens == 15 + worst_case(asked, None).tokens
    assert journal.billed_failures(asked.key).tokens == budget.spent.tokens - 15


def test_retry_after_is_obeyed(journal: Journal) -> None:
    fault = error(429, "slow down", {"retry-after": "0.5"})
    with Stub(once(fault)) as stub:
        started = time.monotonic()
        run(journal, stub, requests(stub, 1))
        assert time.monotonic() - started >= 0.5
        assert len(stub.payloads) == 2


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
def test_retry_after_headers_are_parsed(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_retry_after_may_be_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_link, "time", Clock(now=1_700_000_000.0))
    soon = formatdate(1_700_000_000.0 + 3600, usegmt=True)
    assert retry_after({"retry-after": soon}) == 3600.0


def test_requests_to_a_server_that_keeps_failing_fail_with_its_reason(journal: Journal) -> None:
    with Stub(lambda number, payload: error(500, "out of memory")) as stub:
        tally = run(journal, stub, requests(stub, 2))
        assert len(stub.payloads) == 2 * QUICK.attempts
    assert tally.failed == 2
    assert [reason for _, _, reason in journal.failures()] == ["HTTP 500: out of memory"] * 2


def test_failed_requests_are_sent_again_by_the_next_run(journal: Journal) -> None:
    broken = [True]
    with Stub(lambda n, p: error(500, "oh") if broken[0] else Reply()) as stub:
        asked = requests(stub, 3)
        assert run(journal, stub, asked).failed == 3
        broken[0] = False
        assert run(journal, stub, asked).answered == 3


# --- requests that are not sent again ----------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        (error(400, "the prompt is too long"), "refused", "HTTP 400: the prompt is too long"),
        (error(422, "no such parameter"), "refused", "HTTP 422: no such parameter"),
        (error(422, "no\n  fix:\tit"), "refused", "HTTP 422: no fix: it"),
        (error(200, "no such thing", code="oops"), "invalid", "not a chat completion"),
        (Reply(body=b'{"choices": [{"mess'), "invalid", "not a chat completion"),
        (Reply(body=b'{"hello": 1}'), "invalid", "KeyError: 'choices'"),
        (Reply(body=b'{"choices": [{"text": "old"}]}'), "invalid", "KeyError: 'message'"),
    ],
    ids=[
        "400",
        "422",
        "in several lines",
        "200 with an error",
        "invalid JSON",
        "other JSON",
        "a completion that is no chat",
    ],
)
def test_a_faulty_request_fails_immediately_and_alone(
    journal: Journal, fault: Reply, kind: str, reason: str
) -> None:
    with Stub(once(fault)) as stub:
        tally = run(journal, stub, requests(stub, 3), concurrency=1)
        assert len(stub.payloads) == 3
    assert (tally.answered, tally.failed) == (2, 1)
    ((_, found_kind, found_reason),) = journal.failures()
    assert found_kind == kind
    assert reason in found_reason


def test_a_refusal_in_a_separate_field_is_the_text_of_the_answer(journal: Journal) -> None:
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


def test_a_field_of_the_wrong_type_counts_as_missing(journal: Journal) -> None:
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
def test_an_answer_without_text_is_kept_and_not_paid_for_again(
    journal: Journal, change: dict[str, Any], text: str
) -> None:
    whole = {"usage": {"prompt_tokens": 9, "completion_tokens": 20}, **change}
    for choice in whole["choices"]:
        choice["message"]["reasoning_content"] = "hm"
    with Stub(lambda number, payload: Reply(body=json.dumps(whole).encode())) as stub:
        (asked,) = requests(stub, 1)
        assert run(journal, stub, [asked]).answered == 1
        assert run(journal, stub, [asked]).answered == 0
        assert len(stub.payloads) == 1
    answer = journal.get(asked.key)
    assert answer is not None
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == (text, 9, 20)
    assert answer.reasoning == ("hm" if whole["choices"] else None)


# --- untrusted servers -------------------------------------------------------------------------


def body(text: str = "4", **choice: Any) -> bytes:
    whole = {"message": {"content": text}, "finish_reason": "stop", **choice}
    return json.dumps({"choices": [whole]}).encode()


TOKEN = {"token": "4", "logprob": -0.1, "bytes": [52], "top_logprobs": []}


@pytest.mark.parametrize(
    "fault",
    [
        b"[" * 200_000,
        b'{"choices": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        body(logprobs={"content": [{**TOKEN, "logprob": None}]}),
        body(logprobs={"content": [{**TOKEN, "logprob": "-0.1"}]}),
        body(logprobs={"content": [{**TOKEN, "logprob": 7.0}]}),
        body(logprobs={"content": [{**TOKEN, "logprob": float("nan")}]}),
        body(logprobs={"content": [{**TOKEN, "bytes": [999]}]}),
        body(logprobs={"content": [{**TOKEN, "top_logprobs": [{"token": "4"}]}]}),
        body(logprobs={"content": [{**TOKEN, "top_logprobs": {"4": -0.1}}]}),
        body(logprobs={"content": ["4"]}),
        body("Let me look.", finish_reason="tool_calls"),
        gzip.compress(b"[1, 2", mtime=0),
    ],
    ids=itertools.count(),
)
def test_a_malformed_reply_is_one_failure_and_not_an_answer(journal: Journal, fault: bytes) -> None:
    with Stub(once(Reply(body=fault))) as stub:
        asked = requests(stub, 2)
        tally = run(journal, stub, asked, concurrency=1)
    assert (tally.answered, tally.failed) == (1, 1)
    assert journal.get(asked[0].key) is None
    ((_, kind, _),) = journal.failures()
    assert kind == "invalid"


@pytest.mark.parametrize("reason", ["error", "abort", "cancelled"])
def test_a_request_whose_answer_was_interrupted_is_sent_again(
    journal: Journal, reason: str
) -> None:
    with Stub(once(Reply(text="The capital of", finish_reason=reason))) as stub:
        (asked,) = requests(stub, 1)
        assert run(journal, stub, [asked]).answered == 1
    answer = journal.get(asked.key)
    assert answer is not None
    assert answer.text == "an answer"


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("eos", "stop"),
        ("end_turn", "stop"),
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
    ],
)
def test_other_names_of_finish_reasons_are_translated(
    journal: Journal, word: str, meaning: str
) -> None:
    with Stub(lambda number, payload: Reply(finish_reason=word)) as stub:
        (asked,) = requests(stub, 1)
        run(journal, stub, [asked])
    answer = journal.get(asked.key)
    assert answer is not None
    assert answer.finish_reason == meaning


@pytest.mark.parametrize("packed", [False, True])
def test_a_huge_reply_is_not_read_to_its_end(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(http_link, "MOST_BYTES", 1 << 16)
    whole = body("4" * (1 << 20))
    headers = {"content-encoding": "gzip"} if packed else {}
    reply = Reply(body=gzip.compress(whole) if packed else whole, headers=headers)
    with Stub(once(reply)) as stub:
        (asked,) = requests(stub, 1)
        assert run(journal, stub, [asked]).answered == 1  # by the second attempt
        assert len(stub.payloads) == 2
    ((_, kind, reason),) = journal.failures()
    assert (kind, "more than" in reason) == ("connection", True)
