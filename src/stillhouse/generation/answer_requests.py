"""Sends requests to a text teacher through the journal, and estimates the cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.errors import RunError
from stillhouse.file_locks import try_lock
from stillhouse.finding import Finding
from stillhouse.generation.budget import Spending
from stillhouse.generation.estimate import Estimate, estimate_requests
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Request, Requests
from stillhouse.generation.request_pool import Tally
from stillhouse.generation.text_teacher import TextSource


@dataclass(frozen=True)
class Answers:
    """The answers to a list of requests.

    found: in the order of the requests; None where there is no answer. unanswered: number of
    requests without an answer that are worth sending again, i.e. that were not refused. usd: the
    cost of all answers, from every run; None if a price is unknown. lost: the most that may also
    have been billed for answers that did not arrive.
    """

    found: list[Answer | None]
    unanswered: int
    usd: float | None
    lost: Spending

    def cost(self) -> dict[str, Any]:
        """The costs in a stage's summary, for `cost_line`."""
        return {"usd": self.usd, "lost_usd": self.lost.usd, "lost_tokens": self.lost.tokens}


def cost_line(summary: Mapping[str, Any]) -> str:
    """One line: what a stage's answers cost, and what may have been billed for lost answers."""
    usd, lost = summary["usd"], summary.get("lost_tokens", 0)
    text = "unknown" if usd is None else f"${usd:,.4f}"
    if lost:
        most = f"${summary['lost_usd']:,.4f}, " if summary["lost_usd"] else ""
        text += f"; at most {most}{lost:,} tokens were also billed for lost answers"
    return text


def send_missing(
    source: TextSource, requests: Requests, journal: Journal, spent: Spending | None = None
) -> tuple[Estimate, Tally]:
    """Send the requests that have no answer in the journal.

    spent: the part of the budget that is used; None: what these requests have cost so far. Returns
    the estimate from before sending, and what was sent. Raises EndpointError, ModelError, RunError.
    """
    estimate = estimate_requests(requests(), journal, source.price)
    if not estimate.missing:
        return estimate, Tally()
    return estimate, source.send(
        requests, journal, estimate, estimate.spent if spent is None else spent
    )


def answer_all(source: TextSource, requests: Requests, path: Path, budget: str) -> Answers:
    """Answer all requests, using the journal at `path`.

    budget: the budget's key in the recipe. Raises EndpointError or ModelError, and RunError if the
    budget does not suffice. Answers that arrived are kept.
    """
    with Journal(path) as journal:
        estimate, sent = send_missing(source, requests, journal)
        if sent.out_of_budget:
            raise RunError(
                f"the budget is used up: {estimate.answered + sent.answered:,} of "
                f"{estimate.requests:,} requests are answered",
                where=path,
                fix=f"raise {budget}, or use fewer texts; no request is paid for twice",
            )
        keys = [request.key for request in requests()]
        found = [journal.get(key) for key in keys]
        last = {key: kind for key, kind, _ in journal.failures()}
        pairs = zip(keys, found, strict=True)
        unanswered = sum(one is None and last.get(key) != "refused" for key, one in pairs)
        paid = dict(zip(keys, found, strict=True))  # an equal request is paid for once
        costs = [answer.cost for answer in paid.values() if answer is not None]
        known = [cost for cost in costs if cost is not None]
        lost = sum(map(journal.billed_failures, paid), Spending())
        return Answers(found, unanswered, sum(known) if len(known) == len(costs) else None, lost)


# --- before anything is spent ------------------------------------------------------------------


def estimate_cost(source: TextSource, requests: Requests, path: Path, calls: int = 0) -> Estimate:
    """Count the requests that are answered in the journal at `path`, and estimate the others' cost.

    calls: the number of missing requests to send first (see `send_some`).
    """
    if calls and not being_written(path):
        with Journal(path) as journal:
            send_some(source, requests, journal, calls, Spending())
    with opened_journal(path) as found:
        return estimate_requests(requests(), found, source.price)


def send_some(
    source: TextSource, requests: Requests, journal: Journal, calls: int, spent: Spending
) -> None:
    """Send `calls` of the missing requests, spread evenly over them.

    spent: what other requests have used of the same budget. The answers go to the journal, so
    nothing is paid for twice.
    """
    numbered = enumerate(requests())
    missing = [number for number, request in numbered if not journal.known([request.key])]
    count = min(calls, len(missing))
    if count:
        chosen = frozenset(missing[len(missing) * n // count] for n in range(count))
        estimate = estimate_requests(requests(), journal, source.price)

        def some() -> Iterator[Request]:
            return (request for n, request in enumerate(requests()) if n in chosen)

        send_missing(source, some, journal, estimate.spent + spent)


def findings(
    estimate: Estimate, path: Path, topic: str, things: str = "requests"
) -> Iterator[Finding]:
    """Report for `check` how many `things` are answered in the journal at `path`, and what the
    others cost."""
    fix = None
    if estimate.missing and estimate.between is None:
        fix = "send a few requests with --calls 5 to estimate the cost of the others"
    yield Finding("estimate" if estimate.missing else "ok", topic, estimate.described(things), fix)
    if being_written(path):
        text = "a run has the journal open, so its answers are not counted and no request is sent"
        yield Finding("warning", topic, text, "repeat the command after the run")


def being_written(path: Path) -> bool:
    """Whether another process has the journal open, so that it cannot be read."""
    lock = path.with_name(f"{path.name}.lock")
    if not lock.exists():
        return False
    with lock.open(encoding="utf-8") as file:
        return not try_lock(file, shared=True)


@contextmanager
def opened_journal(path: Path) -> Iterator[Journal | None]:
    """Open the journal; None if there is none yet or another process has it open."""
    if not path.exists() or being_written(path):
        yield None
        return
    with Journal(path) as journal:
        yield journal
