"""Estimates the cost of unanswered requests: the most they can cost, and the likely cost judging
by the answers so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stillhouse.generation.budget import FREE, Price, Spending, spent_on, worst_case
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Request


@dataclass(frozen=True)
class Estimate:
    """The state of a list of requests in the journal.

    requests, missing: number of all requests, and of those without an answer. spent: the cost of
    answers, and of lost answers that may have been billed. worst: the most that the missing
    requests can cost. squares: sums of squares of the answered requests' spending (tokens, USD).
    again: number of answered and of missing requests that repeat an earlier one and so cost
    nothing. price: None if unknown.
    """

    requests: int
    missing: int
    spent: Spending
    worst: Spending
    squares: Sequence[float] = (0.0, 0.0)
    again: Sequence[int] = (0, 0)
    price: Price | None = None

    @property
    def answered(self) -> int:
        return self.requests - self.missing

    @property
    def paid(self) -> tuple[int, int]:
        """Number of requests that were paid for, and number that will be."""
        return self.answered - self.again[0], self.missing - self.again[1]

    @property
    def likely(self) -> Spending | None:
        """What the missing requests cost if they are like the answered ones; None without any."""
        answered, missing = self.paid
        if answered == 0:
            return None
        share = missing / answered
        return Spending(round(self.spent.tokens * share), self.spent.usd * share)

    @property
    def between(self) -> tuple[Spending, Spending] | None:
        """The 95% prediction interval around `likely`; None with fewer than two answers.

        For m new requests and n answered ones with standard deviation s: m · mean ± t · s ·
        √(m + m²/n), with t from Student's distribution with n − 1 degrees of freedom.
        """
        likely, (n, m) = self.likely, self.paid
        if likely is None or n < 2:
            return None
        factor = student_t(n - 1) * math.sqrt(m + m * m / n)
        half = []
        for total, squares in zip((self.spent.tokens, self.spent.usd), self.squares, strict=True):
            variance = max(0.0, squares - total * total / n) / (n - 1)
            half.append(factor * math.sqrt(variance))
        low = Spending(max(0, round(likely.tokens - half[0])), max(0.0, likely.usd - half[1]))
        high = Spending(round(likely.tokens + half[0]), likely.usd + half[1])
        return _least(low, self.worst), _least(high, self.worst)

    def described(self, things: str = "requests") -> str:
        """One line: how many `things` are answered, and what the others cost."""

        def amount(spending: Spending) -> str:
            cost = ", price unknown" if self.price is None else f", ${spending.usd:,.2f}"
            return f"{spending.tokens:,} tokens" + ("" if self.price == FREE else cost)

        text = f"{self.answered:,} of {self.requests:,} {things} are answered"
        if self.missing == 0:
            return text
        about = ""
        if self.likely is not None:
            about = f"about {amount(self.likely)}; "
        if self.between is not None:
            low, high = self.between
            span = f"{low.tokens:,} to {high.tokens:,} tokens"
            if self.price is not None and self.price != FREE:
                span = f"${low.usd:,.2f} to ${high.usd:,.2f}"
            about = f"{about.removesuffix('; ')} (95% likely: {span}); "
        return f"{text}; the rest takes {about}at most {amount(self.worst)}"


def estimate_requests(
    requests: Iterable[Request], journal: Journal | None, price: Price | None
) -> Estimate:
    """Read all requests once. This also finds an invalid prompt before anything is paid for."""
    number = missing = 0
    squares, again = [0.0, 0.0], [0, 0]
    spent = unspent = Spending()
    seen: set[bytes] = set()
    for request in requests:
        number += 1
        answer = None if journal is None else journal.get(request.key, logprobs=False)
        digest = bytes.fromhex(request.key)[:16]
        if digest in seen:  # it is paid for once
            missing += answer is None
            again[answer is None] += 1
            continue
        seen.add(digest)
        taken = Spending() if journal is None else journal.billed_failures(request.key)
        worst = worst_case(request, price)
        if answer is None:
            missing += 1
            unspent += worst
        else:
            taken += spent_on(answer, worst)
            squares = [squares[0] + taken.tokens**2, squares[1] + taken.usd**2]
        spent += taken
    return Estimate(number, missing, spent, unspent, squares, again, price)


def student_t(degrees: int) -> float:
    """The 97.5% quantile of Student's t: exact for 1 and 2 degrees of freedom, otherwise by the
    Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), which is 0.2% off at 3."""
    if degrees == 1:
        return 12.7062
    if degrees == 2:
        return 4.3027
    x = 1.959964
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))


def _least(one: Spending, most: Spending) -> Spending:
    return Spending(min(one.tokens, most.tokens), min(one.usd, most.usd))
