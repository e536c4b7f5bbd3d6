"""Requests with a key and a budget to a server that misbehaves, by either link."""

from __future__ import annotations

import html
import random
import re
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote

from tests.generation.pools import requests, run
from tests.generation.stub import Reply, Stub

from bench.input_trials.trial import Trial, notes_so_far
from bench.knock_trials.server_faults import FAULTS, KEY, Fault, body
from stillhouse.errors import StillhouseError
from stillhouse.generation import client as client_module
from stillhouse.generation import request_pool
from stillhouse.generation.answer_logprobs import mean_log_probability
from stillhouse.generation.budget import Budget, Price, worst_case
from stillhouse.generation.estimate import estimate_requests
from stillhouse.generation.http_link import HttpLink, OpenAILink
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Request
from stillhouse.generation.request_pool import Patience

PRICE = Price(input=10.0, output=30.0)
ASKED = 6
REDIRECTS = (301, 302, 303, 307, 308)
FEWEST = 10
"""Characters of the key that may not be written."""


@dataclass
class Server:
    """What the provider has done. billed: dollars. right: the texts it gave for each question."""

    fault: Fault
    bad: frozenset[int]
    healthy: bool = False
    billed: float = 0.0
    received: int = 0
    wrong_texts: set[str] = field(default_factory=set)

    def reply(self, number: int, payload: dict[str, Any]) -> Reply:
        faulty = not self.healthy and self.received in self.bad
        self.received += 1
        text = text_for(payload["messages"][-1]["content"])
        if not faulty or self.fault.billed:
            self.billed += PRICE.of(10, 5)
        return self.fault.reply(text) if faulty else Reply(text=text)


def text_for(question: str) -> str:
    return f"the answer to {question}"


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    link = (HttpLink, OpenAILink)[number % 2]
    if number % 18 == 17:
        return _redirected(chance, folder, link)
    fault = FAULTS[number // 2 % len(FAULTS)](chance)
    few = frozenset(chance.sample(range(ASKED), chance.randint(1, 3)))
    bad = chance.choice([few, frozenset(range(100))])
    server, room = Server(fault, bad), chance.choice([1.5, 3.5, 8.5, 20.0])
    title = f"{link.__name__}: {fault.name}, for {len(bad)}, budget for {room:g}"
    return Trial(title, lambda: _problem(server, link, room, folder), lambda found: found)


def _redirected(chance: random.Random, folder: Path, link: Any) -> Trial:
    """To another server, which would answer."""
    code = chance.choice(REDIRECTS)

    def read() -> str | None:
        with Stub() as other:
            fault = Fault("", lambda text: body(b"", code, location=other.url), (), billed=False)
            found = _problem(Server(fault, frozenset(range(100))), link, 20.0, folder)
            return "prompts went to another server" if other.payloads else found

    return Trial(f"{link.__name__}: redirect {code}", read, lambda found: found)


def _problem(server: Server, link: Any, room: float, folder: Path) -> str | None:
    """Two runs with one budget, the second with a server in good health; what is wrong then."""
    said: list[str] = []
    with Stub(server.reply, key=KEY) as stub, _linked(link):
        asked = requests(stub, ASKED)
        limit = worst_case(asked[0], PRICE).usd * room
        for healthy in (False, True):
            server.healthy = healthy
            try:
                _ask(folder / "answers.sqlite", stub.url, asked, limit)
            except StillhouseError as error:
                said.append(str(error))
                if not error.where or not error.fix:
                    return f"unclear: {error}"
        said.append(notes_so_far())
    if server.billed > limit * (1 + 1e-9):
        return f"overspent: ${server.billed} of ${limit}"
    return _wrong_in_journal(folder / "answers.sqlite", asked, server.fault) or _key_in(
        folder, said
    )


def _ask(path: Path, url: str, asked: list[Request], limit: float) -> None:
    with Journal(path) as journal:
        budget = Budget(max_usd=limit)
        budget.spent = estimate_requests(asked, journal, PRICE).spent
        run(
            journal, url, asked, concurrency=3, budget=budget, price=PRICE, timeout=0.6,
            key_env="KNOCKS_KEY", patience=Patience(attempts=2, backoff=0.01),
        )  # fmt: skip


def _wrong_in_journal(path: Path, asked: list[Request], fault: Fault) -> str | None:
    with Journal(path) as journal:
        for request in asked:
            answer = journal.get(request.key)
            if answer is None:
                continue
            mean_log_probability(answer)
            right = text_for(request.messages[-1]["content"])
            if answer.text not in (right, *fault.texts) and "*" not in fault.texts:
                return f"a wrong answer: {answer.text[:100]!r}"
    return None


def _key_in(folder: Path, said: list[str]) -> str | None:
    with closing(sqlite3.connect(folder / "answers.sqlite")) as connection:
        for table in ("answers", "failures"):
            said += [str(row) for row in connection.execute(f"SELECT * FROM {table}")]
    for text in said:
        at = next((p for p in _plain(text) if KEY[:FEWEST] in p), None)
        if at is not None:
            start = at.find(KEY[:FEWEST])
            return f"the key is written: {at[max(0, start - 40) : start + 60]!r}"
    return None


def _plain(text: str) -> list[str]:
    """The text, and without one, two and three layers of escapes."""
    found = [text]
    for _ in range(4):
        text = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
        text = re.sub(r"\\+x([0-9a-fA-F]{2})", lambda m: chr(int(m[1], 16)), text)
        text = unquote(html.unescape(text)).replace("\\", "")
        found.append(text)
    return found


@contextmanager
def _linked(link: Any) -> Any:
    """The link for plain HTTP; a server that says "slow down" is given up after a second."""
    with (
        mock.patch.object(client_module, "HttpLink", link),
        mock.patch.object(request_pool, "LONGEST_WAIT", 1.0),
        mock.patch.dict("os.environ", {"KNOCKS_KEY": KEY}),
    ):
        yield
