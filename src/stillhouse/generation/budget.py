"""Keeps spending within a budget: the worst case of a request is reserved before it is sent.

The sum of what was billed and what is reserved never exceeds a limit, so no request in flight can
exceed it. A prompt has at most as many tokens as bytes, plus some for the chat template around each
message; an answer has at most its token limit. Parameters that are not numbers (tools, a schema)
count as part of the prompt, because servers put them there.
"""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.generation.request import Answer, Request

_TEMPLATE_TOKENS = 16
"""Maximum tokens that a chat template adds around each message, and around the whole chat."""

TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")
"""Parameters that limit the number of tokens in an answer."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


FREE = Price(0.0, 0.0)


@dataclass(frozen=True)
class Spending:
    """Tokens, and US dollars if the price is known (otherwise 0)."""

    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: Spending) -> Spending:
        return Spending(self.tokens + other.tokens, self.usd + other.usd)

    def __sub__(self, other: Spending) -> Spending:
        return Spending(self.tokens - other.tokens, self.usd - other.usd)


def worst_case(request: Request, price: Price | None) -> Spending:
    """The most that a request, which has a token limit, can cost."""
    shown = [value for value in request.parameters.values() if not isinstance(value, int | float)]
    prompt = _TEMPLATE_TOKENS + sum(
        _TEMPLATE_TOKENS + len(str(part).encode("utf-8", "replace"))
        for part in (*request.messages, *shown)
    )
    answer = next(int(request.parameters[k]) for k in TOKEN_LIMITS if k in request.parameters)
    return Spending(prompt + answer, price.of(prompt, answer) if price else 0.0)


def spent_on(answer: Answer, worst: Spending) -> Spending:
    """What an answer cost, assuming the worst case for anything that the server did not report."""
    if answer.prompt_tokens is None or answer.completion_tokens is None:
        return worst
    tokens = answer.prompt_tokens + answer.completion_tokens
    return Spending(tokens, worst.usd if answer.cost is None else answer.cost)


class Budget:
    """Limits on dollars and tokens.

    spent: what was or may have been billed. reserved: the worst case of requests in flight.
    """

    def __init__(self, max_usd: float | None = None, max_tokens: int | None = None) -> None:
        self.max_usd, self.max_tokens = max_usd, max_tokens
        self.spent = self.reserved = Spending()

    @property
    def limited(self) -> bool:
        return self.max_usd is not None or self.max_tokens is not None

    def reserve(self, worst: Spending) -> bool:
        """Reserve `worst`; return False if that could exceed a limit."""
        after = self.spent + self.reserved + worst
        if self.max_usd is not None and after.usd > self.max_usd:
            return False
        if self.max_tokens is not None and after.tokens > self.max_tokens:
            return False
        self.reserved += worst
        return True

    def settle(self, worst: Spending, spent: Spending) -> None:
        """Replace a reservation with what was spent."""
        self.reserved -= worst
        self.spent += spent
        if self.reserved.tokens == 0:  # no rounding errors remain
            self.reserved = Spending()
