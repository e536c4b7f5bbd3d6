"""Sends as many requests at once as the endpoint accepts, each until it is answered or fails.

Answers go to the journal immediately. A request that is in the journal or in flight is not sent
again. The worst-case cost is reserved before a request is sent (`budget`).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from stillhouse.errors import EndpointError, RunError
from stillhouse.generation.budget import Budget, Price, Spending, spent_on, worst_case
from stillhouse.generation.client import FailedAttempt
from stillhouse.generation.concurrency import AdaptiveLimit, now
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Failure, Request
from stillhouse.teachers.http_link import PATIENCE, Patience

Send = Callable[[Request], Awaitable[Answer | FailedAttempt]]

MOST_FAILURES = 50
"""Number of consecutive failed requests, with no answer in between, after which sending stops."""
LONGEST_WAIT = 600.0
"""In seconds. Requests fail if the server requests a longer pause, or is silent for longer."""
SPACE, SPACE_PER_REQUEST = 1 << 20, 1 << 16
"""Bytes that must be free on the journal's disk before a request is sent, because an answer that
cannot be stored would be paid for again."""
_LOOKED_UP = 256
_COLLECT_AFTER = 100_000
"""Number of new objects after which Python looks for cycles while requests are sent; the default is
700."""
GRACE = 15.0
"""Seconds that requests in flight have to finish after the first cancellation, or an error that
stops everything."""


@dataclass
class Tally:
    """The outcome of sending requests.

    answered: number of new answers in the journal. failed: number of requests that failed.
    out_of_budget: whether the budget stopped the rest.
    """

    answered: int = 0
    failed: int = 0
    out_of_budget: bool = False


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
        patience: Patience = PATIENCE,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.send, self.journal, self.budget, self.price = send, journal, budget, price
        self.concurrency, self.patience, self.advance = concurrency, patience, advance
        self.limit = AdaptiveLimit(concurrency)
        self.tally = Tally()
        self._sent: set[str] = set()
        self._commits: set[Future[None]] = set()
        self._sending: set[asyncio.Task[None] | None] = set()
        self._stopped: BaseException | None = None
        self._failures_in_a_row = 0
        self._last_answer = 0.0
        self._answers = False  # whether the endpoint has answered any of these requests
        self._settled = asyncio.Event()

    async def answer_all(self, requests: Iterable[Request]) -> Tally:
        """Send every request whose answer is not in the journal; `requests` is read lazily.

        Returns when all have been answered or have failed, or the budget is used up. Raises
        EndpointError if no request can succeed, and RunError if the journal cannot be written;
        answers that arrived are kept. The first cancellation stops new requests and waits for those
        in flight; the second does not wait.
        """
        todo = self._unanswered(iter(requests))
        workers = [asyncio.create_task(self._work(todo)) for _ in range(self.concurrency)]
        with _seldom_collected():
            try:
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
                await self._last_answers(workers)
            except asyncio.CancelledError as cancelled:
                self._stopped = self._stopped or cancelled
                await self._last_answers(workers)
                raise
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                commits = list(self._commits)
                await asyncio.gather(*map(asyncio.wrap_future, commits), return_exceptions=True)
        if self._stopped is not None:
            raise self._stopped
        return self.tally

    async def _last_answers(self, workers: Iterable[asyncio.Task[None]]) -> None:
        for worker in workers:
            if worker not in self._sending:
                worker.cancel()
        await asyncio.wait(workers, timeout=GRACE)

    def _unanswered(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Yield the requests that have no answer.

        Many are looked up in the journal at a time, which costs little more than one. Requests that
        were refused in an earlier run come last, because many in a row would look like a server
        that rejects everything.
        """
        refused_before = []
        while chunk := list(itertools.islice(requests, _LOOKED_UP)):
            keys = [request.key for request in chunk]
            # A request in flight may be answered before its duplicate in this chunk is reached.
            # The order matters: a key leaves `_sent` only when its answer is in the journal.
            known = set(self._sent)
            answered = self.journal.known(keys)
            self._answers = self._answers or bool(answered)
            known |= answered
            refused = self.journal.refused(keys)
            for request in chunk:
                if request.key in known:
                    self.advance(1)
                    continue
                known.add(request.key)
                self._sent.add(request.key)
                if request.key in refused:
                    refused_before.append(request)
                else:
                    yield request
        yield from refused_before

    async def _work(self, todo: Iterator[Request]) -> None:
        try:
            while not self._is_over and (request := next(todo, None)) is not None:
                await self._answer(request)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                self._stopped = self._stopped or error
            raise

    @property
    def _is_over(self) -> bool:
        return self._stopped is not None or self.tally.out_of_budget

    async def _answer(self, request: Request) -> None:
        """Send one request until it is answered, fails permanently, or is out of attempts."""
        worst = worst_case(request, self.price)
        attempts = tries = 0
        first = None
        while await self._reserve(worst):
            self._require_space(worst)
            sent = await self.limit.acquire()
            first = sent if first is None else first
            spent = Spending()
            try:
                outcome = await self._send(request, worst)
                if isinstance(outcome, Answer):
                    spent = spent_on(outcome, worst)
                elif outcome.billed:
                    spent = worst
            finally:
                self.limit.release()
                self.budget.settle(worst, spent)
                self._settled.set()
            if isinstance(outcome, Answer):
                return await self._keep(request, outcome)
            tries += 1
            attempts += outcome.kind != "rate_limit"
            pause = max(outcome.wait or 0.0, self.patience.wait(tries))
            if outcome.kind == "rate_limit":
                self.limit.throttled(sent, outcome.wait or 0.0)
            elif outcome.kind == "timeout":
                self.limit.timed_out(sent)
            # Time in our own queue, while the server answers other requests, does not count.
            waited_for = now() - max(first, self._last_answer) + pause
            patient = attempts < self.patience.attempts and waited_for < LONGEST_WAIT
            if not outcome.retry or not patient or self._stopped is not None:
                return self._give_up(request, outcome, spent, tries)
            if outcome.billed:
                self._note_failure(request, outcome, spent, tries)
            await asyncio.sleep(pause)
        return None

    def _require_space(self, worst: Spending) -> None:
        """Raise RunError if the answers in flight may not fit on the disk."""
        # A row is in the write-ahead log and in the file, with up to two bytes per character.
        each = max(SPACE_PER_REQUEST, 4 * self.journal.largest_row)
        if self._disk_free() >= SPACE + each * self.concurrency:
            return
        self.budget.settle(worst, Spending())
        raise RunError(
            "the disk is almost full, so no more requests are sent",
            where=self.journal.path,
            fix="free some space and repeat the command: answers that arrived are kept",
        )

    def _disk_free(self) -> int:
        return shutil.disk_usage(self.journal.path.parent).free

    async def _send(self, request: Request, worst: Spending) -> Answer | FailedAttempt:
        """Send a request once; one that is canceled in flight may have been billed."""
        if self.price is not None or self.budget.limited:
            await self._write_reservation(request, worst)
        task = asyncio.current_task()
        self._sending.add(task)
        try:
            return await self.send(request)
        except asyncio.CancelledError:
            failed = FailedAttempt("connection", "cancelled in flight", retry=False, billed=True)
            self._note_failure(request, failed, worst, 1)
            raise
        finally:
            self._sending.discard(task)

    async def _write_reservation(self, request: Request, worst: Spending) -> None:
        """Commit the most that a request can cost, so that it is known after a kill."""
        cost = worst.usd if self.price else None
        try:
            await asyncio.wrap_future(self.journal.reserve(request, cost, worst.tokens))
        except asyncio.CancelledError:
            self._follow(self.journal.release(request))
            raise

    async def _reserve(self, worst: Spending) -> bool:
        """Reserve budget for a request; False if there is none, and no request in flight can free
        any."""
        while not self.budget.reserve(worst):
            if self.budget.reserved.tokens == 0:
                self.tally.out_of_budget = True
                return False
            self._settled.clear()
            await self._settled.wait()
            if self._is_over:
                return False
        return True

    async def _keep(self, request: Request, answer: Answer) -> None:
        """Record an answer. Returns once it is in the journal, so that a kill loses only answers
        that were in flight."""
        self.limit.answered()
        self._failures_in_a_row, self._last_answer = 0, now()
        self._answers = True
        self.tally.answered += 1
        commit = self.journal.record(request, answer)
        commit.add_done_callback(lambda _: self._sent.discard(request.key))
        self._follow(commit)
        self.advance(1)
        await asyncio.wait([asyncio.wrap_future(commit)])

    def _give_up(
        self, request: Request, failed: FailedAttempt, spent: Spending, tries: int
    ) -> None:
        self._note_failure(request, failed, spent, tries)
        self._sent.discard(request.key)
        self.tally.failed += 1
        self.advance(1)
        # If the server answers other requests, it refuses these because of their content.
        self._failures_in_a_row += failed.kind != "refused" or not self._answers
        if (failed.wait or 0.0) >= LONGEST_WAIT:
            raise EndpointError(
                f"the server requests a pause of {failed.wait:,.0f} s before the next request: "
                f"{failed.reason}",
                where=request.endpoint,
                fix="repeat the command after that time, or raise the account's limit: answers "
                "that arrived are kept",
            )
        if self._failures_in_a_row >= MOST_FAILURES:
            raise EndpointError(
                f"{self._failures_in_a_row} requests in a row failed; the last: {failed.reason}",
                where=request.endpoint,
                fix="check that the server is up, then repeat the command: answers that arrived "
                "are kept",
            )

    def _note_failure(
        self, request: Request, failed: FailedAttempt, spent: Spending, tries: int
    ) -> None:
        cost = spent.usd if self.price else None
        failure = Failure(failed.kind, failed.reason, tries, cost, spent.tokens)
        self._follow(self.journal.record_failure(request, failure))

    def _follow(self, commit: Future[None]) -> None:
        """Keep track of a commit until it is done; if it fails, everything stops."""
        self._commits.add(commit)
        commit.add_done_callback(self._committed)

    def _committed(self, commit: Future[None]) -> None:
        """Handle a commit that is done. Called in the journal's thread."""
        self._commits.discard(commit)
        self._stopped = self._stopped or commit.exception()


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Run Python's garbage collector less often inside the block.

    Thousands of requests per second create garbage without cycles, and the search for cycles in the
    objects of every library would take 200 of 500 microseconds per request.
    """
    usual = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
