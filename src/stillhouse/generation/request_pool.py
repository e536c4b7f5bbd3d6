"""Many requests at once: as many as the endpoint bears, each until it is answered or given up.

Whatever arrives is handed to the journal at once. A request that is in the journal, or on its way,
is not sent again. What may be spent is set aside before anything is sent (`budget`).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from stillhouse.errors import EndpointError
from stillhouse.generation.budget import Budget, Price, Spending, spent_on, worst_case
from stillhouse.generation.client import Trouble
from stillhouse.generation.concurrency import AdaptiveLimit, now
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Failure, Request

Send = Callable[[Request], Awaitable[Answer | Trouble]]

HOPELESS_FAILURES = 50
"""Requests given up in a row, with no answer between them, after which nothing more is sent."""
LONGEST_WAIT = 600.0
"""Seconds: a server that wants a longer pause, or answers nobody for longer, is not waited for."""
LONGEST_BACKOFF = 30.0
_LOOKED_UP = 256
_COLLECT_AFTER = 100_000
"""New objects after which Python looks for cycles, while requests are answered; usually 700."""
GRACE = 15.0
"""Seconds that answers on their way have to arrive, after an error that ends everything, or after
this work is cancelled for the first time."""


@dataclass(frozen=True)
class Patience:
    """attempts: how often one request is sent, 429 not counted. backoff: seconds before the second
    attempt, doubled with each; a little chance keeps requests from returning all at once."""

    attempts: int = 6
    backoff: float = 0.5

    def wait(self, tries: int) -> float:
        longest = min(LONGEST_BACKOFF, self.backoff * 2.0 ** min(tries - 1, 16))
        return longest * random.uniform(0.5, 1.0)


@dataclass
class Tally:
    """answered: new answers that are in the journal. reused: requests whose answer was there, or
    that are asked for twice. spent: by new answers, those that may have been billed included.
    unpriced: new answers whose cost nobody knows. out_of_budget: a limit stopped the rest."""

    answered: int = 0
    reused: int = 0
    failed: int = 0
    spent: Spending = field(default_factory=Spending)
    unpriced: int = 0
    out_of_budget: bool = False
    throttled: int = 0


class Pool:
    """Answers requests through `send`; see `answer_all`."""

    def __init__(
        self,
        send: Send,
        journal: Journal,
        budget: Budget,
        *,
        concurrency: int,
        price: Price | None = None,
        patience: Patience = Patience(),
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.send, self.journal, self.budget, self.price = send, journal, budget, price
        self.concurrency, self.patience, self.advance = concurrency, patience, advance
        self.limit = AdaptiveLimit(concurrency)
        self.tally = Tally()
        self._asked: set[str] = set()
        self._commits: set[Future[None]] = set()
        self._sending: set[asyncio.Task[None] | None] = set()
        self._stopped: BaseException | None = None
        self._failures_in_a_row = 0
        self._last_answer = 0.0
        self._answers = False  # whether the endpoint ever answered one of these requests
        self._settled = asyncio.Event()

    async def answer_all(self, requests: Iterable[Request]) -> Tally:
        """Sends every request whose answer is not in the journal; `requests` is read lazily.

        Returns when all are answered or given up, or the budget allows no more.
        Raises EndpointError where no request can succeed, RunError where the journal cannot be
        written; what arrived is kept in either case. Cancelled once, it sends no more and waits for
        what is on its way; a second time, it does not wait.
        """
        with _seldom_collected():
            return await self._answer_all(iter(requests))

    async def _answer_all(self, requests: Iterator[Request]) -> Tally:
        todo = self._unanswered(requests)
        workers = [asyncio.create_task(self._work(todo)) for _ in range(self.concurrency)]
        try:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            await self._last_answers(workers)
        except asyncio.CancelledError as cancelled:
            self._stopped = self._stopped or cancelled
            await self._last_answers(workers)
            raise
        finally:
            _cancel(workers)
            await asyncio.gather(*workers, return_exceptions=True)
            commits = list(self._commits)
            await asyncio.gather(*map(asyncio.wrap_future, commits), return_exceptions=True)
        if self._stopped is not None:
            raise self._stopped
        return self.tally

    async def _last_answers(self, workers: Iterable[asyncio.Task[None]]) -> None:
        _cancel(worker for worker in workers if worker not in self._sending)
        await asyncio.wait(workers, timeout=GRACE)

    def _unanswered(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Looks many up in the journal at a time, which costs little more than one. Those that an
        earlier run was refused come last: so many in a row would look like a server that refuses
        everything."""
        refused_before = []
        while chunk := list(itertools.islice(requests, _LOOKED_UP)):
            keys = [request.key for request in chunk]
            # What is on its way now may be answered before its double in this chunk is reached.
            # In this order: a key leaves `_asked` only when the journal has its answer.
            known = set(self._asked)
            answered = self.journal.known(keys)
            self._answers = self._answers or bool(answered)
            known |= answered
            refused = self.journal.refused(keys)
            for request in chunk:
                if self._stopped is not None or self.tally.out_of_budget:
                    return
                if request.key in known:
                    self.tally.reused += 1
                    self.advance(1)
                    continue
                known.add(request.key)
                self._asked.add(request.key)
                if request.key in refused:
                    refused_before.append(request)
                else:
                    yield request
        for request in refused_before:
            if self._stopped is not None or self.tally.out_of_budget:
                return
            yield request

    async def _work(self, todo: Iterator[Request]) -> None:
        try:
            for request in todo:
                await self._answer(request)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                self._stopped = self._stopped or error
            raise

    async def _answer(self, request: Request) -> None:
        """Sends one request until it is answered, hopeless, or out of attempts."""
        worst = worst_case(request, self.price)
        attempts = tries = 0
        first = None
        while await self._reserve(worst):
            sent = await self.limit.acquire()
            first = sent if first is None else first
            spent = Spending()
            try:
                outcome = await self._send(request)
                if isinstance(outcome, Answer):
                    spent = spent_on(outcome, worst)
                elif outcome.billed:
                    spent = worst
            finally:
                self.limit.release()
                self._settle(worst, spent)
            if isinstance(outcome, Answer):
                return self._keep(request, outcome)
            tries += 1
            attempts += outcome.kind != "rate_limit"
            pause = max(outcome.wait or 0.0, self.patience.wait(tries))
            if outcome.kind == "rate_limit":
                self.tally.throttled += 1
                self.limit.throttled(sent, outcome.wait or 0.0)
            # The time in our own queue, while the server answers others, says nothing about it.
            waited_for = now() - max(first, self._last_answer) + pause
            patient = attempts < self.patience.attempts and waited_for < LONGEST_WAIT
            if not outcome.again or not patient or self._stopped is not None:
                return self._give_up(request, outcome, spent, tries)
            if outcome.billed:
                self._note_failure(request, outcome, spent, tries)
            await asyncio.sleep(pause)
        return None

    async def _send(self, request: Request) -> Answer | Trouble:
        """Asks; a request that is cancelled on its way may have been billed."""
        task = asyncio.current_task()
        self._sending.add(task)
        try:
            return await self.send(request)
        except asyncio.CancelledError:
            spent = worst_case(request, self.price)
            trouble = Trouble("connection", "stopped on its way", again=False, billed=True)
            self._note_failure(request, trouble, spent, 1)
            raise
        finally:
            self._sending.discard(task)

    async def _reserve(self, worst: Spending) -> bool:
        """False where the budget has no room and nothing on its way can make any."""
        while not self.budget.reserve(worst):
            if self.budget.reserved.tokens == 0:
                self.tally.out_of_budget = True
                return False
            self._settled.clear()
            await self._settled.wait()
            if self._stopped is not None or self.tally.out_of_budget:
                return False
        return True

    def _settle(self, worst: Spending, spent: Spending) -> None:
        self.budget.settle(worst, spent)
        self.tally.spent += spent
        self._settled.set()

    def _keep(self, request: Request, answer: Answer) -> None:
        self.limit.answered()
        self._failures_in_a_row, self._last_answer = 0, now()
        self._answers = True
        self.tally.answered += 1
        self.tally.unpriced += answer.cost is None
        commit = self.journal.record(request, answer)
        commit.add_done_callback(lambda _: self._asked.discard(request.key))
        self._follow(commit)
        self.advance(1)

    def _give_up(self, request: Request, trouble: Trouble, spent: Spending, tries: int) -> None:
        self._note_failure(request, trouble, spent, tries)
        self._asked.discard(request.key)
        self.tally.failed += 1
        self.advance(1)
        # A server that answers others and refuses these refuses what they say.
        self._failures_in_a_row += trouble.kind != "refused" or not self._answers
        if (trouble.wait or 0.0) >= LONGEST_WAIT or self._failures_in_a_row >= HOPELESS_FAILURES:
            raise EndpointError(
                f"{self._failures_in_a_row} requests in a row were given up; the last: "
                f"{trouble.reason}",
                where=request.endpoint,
                fix="see that the server is up and answers, then give the same command again: "
                "what arrived is kept",
            )

    def _note_failure(
        self, request: Request, trouble: Trouble, spent: Spending, tries: int
    ) -> None:
        cost = spent.usd if self.price else None
        failure = Failure(trouble.kind, trouble.reason, tries, cost, spent.tokens)
        self._follow(self.journal.record_failure(request, failure))

    def _follow(self, commit: Future[None]) -> None:
        """Remembers a commit until it is done; one that fails stops everything."""
        self._commits.add(commit)
        commit.add_done_callback(self._committed)

    def _committed(self, commit: Future[None]) -> None:
        """In the journal's thread."""
        self._commits.discard(commit)
        self._stopped = self._stopped or commit.exception()


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Thousands of requests a second make garbage that is counted away at once, and with it Python
    would look for cycles all the time, among the objects of every library: 200 of 500 microseconds
    a request."""
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def _cancel(workers: Iterable[asyncio.Task[None]]) -> None:
    for worker in workers:
        worker.cancel()
