"""Gets requests answered by a text teacher, through the journal; and estimates what that costs."""

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
from stillhouse.generation.text_teacher import Sent, TextSource


@dataclass(frozen=True)
class Answers:
    """found: in the order of the requests; None without an answer. unanswered: how many of those
    without an answer are worth sending again: all but the refused ones. usd: the cost of all
    answers, from every run; None if a price is unknown. lost: the most that may have been billed
    beside that, for answers that did not arrive."""

    found: list[Answer | None]
    unanswered: int
    usd: float | None
    lost: Spending

    def cost(self) -> dict[str, Any]:
        """For a stage's summary, see `cost_line`."""
        return {"usd": self.usd, "lost_usd": self.lost.usd, "lost_tokens": self.lost.tokens}


def cost_line(summary: Mapping[str, Any]) -> str:
    """What a stage's answers cost, and what may have been billed for those that were lost."""
    usd, lost = summary["usd"], summary.get("lost_tokens", 0)
    text = "unknown" if usd is None else f"${usd:,.4f}"
    if lost:
        most = f"${summary['lost_usd']:,.4f}, " if summary["lost_usd"] else ""
        text += f"; at most {most}{lost:,} tokens more were billed for answers that were lost"
    return text


def send_missing(
    source: TextSource, requests: Requests, journal: Journal, spent: Spending | None = None
) -> tuple[Estimate, Sent]:
    """Sends the requests without an answer in the journal; what it had before, and what arrived.

    spent: of the budget until now; None: on these requests.
    Raises EndpointError, ModelError, RunError.
    """
    estimate = estimate_requests(requests(), journal, source.price)
    if not estimate.missing:
        return estimate, Sent(0, 0, False)
    return estimate, source.send(
        requests, journal, estimate, estimate.spent if spent is None else spent
    )


def answer_all(source: TextSource, requests: Requests, path: Path, budget: str) -> Answers:
    """The answers to all requests, by the journal at `path`.

    budget: its key in the recipe. Raises EndpointError, ModelError; RunError if the budget does not
    last: answers that arrived are kept.
    """
    with Journal(path) as journal:
        estimate, sent = send_missing(source, requests, journal)
        if sent.out_of_budget:
            raise RunError(
                f"the budget is used up: {estimate.answered + sent.new:,} of {estimate.requests:,} "
                "requests are answered",
                where=path,
                fix=f"raise {budget}, or give fewer texts; no request is paid for twice",
            )
        keys = [request.key for request in requests()]
        found = [journal.get(key) for key in keys]
        last = {key: kind for key, kind, _ in journal.failures()}
        pairs = zip(keys, found, strict=True)
        open_keys = [key for key, one in pairs if one is None and last.get(key) != "refused"]
        paid = dict(zip(keys, found, strict=True))  # an equal request is paid for once
        costs = [answer.cost for answer in paid.values() if answer is not None]
        known = [cost for cost in costs if cost is not None]
        lost = Spending()
        for key in paid:
            usd, tokens = journal.billed_failures(key)
            lost += Spending(tokens, usd)
        return Answers(
            found, len(open_keys), sum(known) if len(known) == len(costs) else None, lost
        )


# --- before anything is spent ------------------------------------------------------------------


def estimate_cost(source: TextSource, requests: Requests, path: Path, calls: int = 0) -> Estimate:
    """What the journal at `path` has of the requests, and what the rest costs.

    calls: the number of missing requests to send first (see `send_some`).
    """
    if calls and not being_written(path):
        with Journal(path) as journal:
            send_some(source, requests, journal, calls, Spending())
    with opened_journal(path) as found:
        return estimate_requests(requests(), found, source.price)


def send_some(
    source: TextSource,
    requests: Requests,
    journal: Journal,
    calls: int,
    spent: Spending,
) -> None:
    """Sends `calls` of the missing requests, spread evenly over them. spent: of the same budget, on
    other requests. The answers go to the journal, so that nothing is paid for twice."""
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
    """The lines of `check` about what is answered and what the rest costs. path: the journal."""
    fix = None
    if estimate.missing and estimate.between is None:
        fix = "--calls 5 sends a few requests, which count, to estimate the rest"
    yield Finding("estimate" if estimate.missing else "ok", topic, estimate.described(things), fix)
    if being_written(path):
        text = "a run has the journal open: what it holds is not counted, and no request is sent"
        yield Finding("warning", topic, text, "repeat the command after the run")


def being_written(path: Path) -> bool:
    """Whether a process has the journal open, so that others cannot read it."""
    lock = path.with_name(f"{path.name}.lock")
    if not lock.exists():
        return False
    with lock.open(encoding="utf-8") as file:
        return not try_lock(file, shared=True)


@contextmanager
def opened_journal(path: Path) -> Iterator[Journal | None]:
    """The journal; None if there is none yet, or another process has it open."""
    if not path.exists() or being_written(path):
        yield None
        return
    with Journal(path) as journal:
        yield journal
