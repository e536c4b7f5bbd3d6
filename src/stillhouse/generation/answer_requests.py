"""Gets requests answered by a text teacher, through the journal; and estimates what that costs."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stillhouse.errors import RunError
from stillhouse.finding import Finding
from stillhouse.generation.budget import Spending
from stillhouse.generation.estimate import Known, known_before
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Requests
from stillhouse.generation.text_teacher import Sent, TextSource


@dataclass(frozen=True)
class Answers:
    """found: in the order of the requests; None without an answer. unanswered: how many of those
    without an answer are worth sending again: all but the refused ones."""

    found: list[Answer | None]
    unanswered: int

    @property
    def usd(self) -> float | None:
        """The cost of all answers, from every run; None if a price is unknown."""
        costs = [answer.cost for answer in self.found if answer is not None]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None


def send_missing(
    source: TextSource, requests: Requests, journal: Journal, spent: Spending | None = None
) -> tuple[Known, Sent]:
    """Sends the requests without an answer in the journal; what it had before, and what arrived.

    spent: of the budget until now; None: on these requests.
    Raises EndpointError, ModelError, RunError.
    """
    known = known_before(requests(), journal, source.price)
    if not known.missing:
        return known, Sent(0, 0, False)
    return known, source.send(requests, journal, known, known.spent if spent is None else spent)


def answer_all(source: TextSource, requests: Requests, path: Path, budget: str) -> Answers:
    """The answers to all requests, by the journal at `path`.

    budget: its key in the recipe. Raises EndpointError, ModelError; RunError if the budget does not
    last: answers that arrived are kept.
    """
    with Journal(path) as journal:
        known, sent = send_missing(source, requests, journal)
        if sent.out_of_budget:
            raise RunError(
                f"the budget is used up: {known.answered + sent.new:,} of {known.requests:,} "
                "requests are answered",
                where=path,
                fix=f"raise {budget}, or give fewer texts; no request is paid for twice",
            )
        keys = [request.key for request in requests()]
        found = [journal.get(key) for key in keys]
        last = {key: kind for key, kind, _ in journal.failures()}
        pairs = zip(keys, found, strict=True)
        open_keys = [key for key, one in pairs if one is None and last.get(key) != "refused"]
        return Answers(found, len(open_keys))


# --- before anything is spent ------------------------------------------------------------------


def estimate(source: TextSource, requests: Requests, path: Path, calls: int = 0) -> Known:
    """What the journal at `path` has of the requests, and what the rest costs.

    calls: the number of missing requests to send first (see `send_some`).
    """
    if calls and not being_written(path):
        with Journal(path) as journal:
            send_some(source, requests, journal, calls, Spending())
    with opened_journal(path) as found:
        return known_before(requests(), found, source.price)


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
    missing = [number for number, request in numbered if journal.get(request.key) is None]
    count = min(calls, len(missing))
    if count:
        chosen = frozenset(missing[len(missing) * n // count] for n in range(count))
        known = known_before(requests(), journal, source.price)
        some = lambda: (r for n, r in enumerate(requests()) if n in chosen)  # noqa: E731
        send_missing(source, some, journal, known.spent + spent)


def findings(known: Known, path: Path, topic: str, things: str = "requests") -> Iterator[Finding]:
    """The lines of `check` about what is answered and what the rest costs. path: the journal."""
    fix = None
    if known.missing and known.between is None:
        fix = "--calls 5 sends a few requests, which count, to estimate the cost of the rest"
    yield Finding("estimate" if known.missing else "ok", topic, known.described(things), fix)
    if being_written(path):
        text = "a run has the journal open: what it holds is not counted, and no request is sent"
        yield Finding("warning", topic, text, "repeat the command after the run")


def being_written(path: Path) -> bool:
    """Whether a process has the journal open, so that others cannot read it."""
    lock = path.with_name(f"{path.name}.lock")
    if not lock.exists():
        return False
    with lock.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def opened_journal(path: Path) -> Iterator[Journal | None]:
    """The journal; None if there is none yet, or another process has it open."""
    if not path.exists() or being_written(path):
        yield None
        return
    with Journal(path) as journal:
        yield journal
