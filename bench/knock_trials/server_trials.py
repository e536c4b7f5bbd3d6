"""Trials that send requests with a key and a budget to a server that misbehaves."""

from __future__ import annotations

import html
import json
import os
import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote

import yaml
from tests import tiny
from tests.generation.pools import requests, run
from tests.generation.stub import Reply, Stub

from bench.input_trials.busy import on_busy_cores
from bench.input_trials.trial import Trial, notes_so_far
from bench.knock_trials.server_faults import FAULTS, KEY, Fault, body
from stillhouse.commands import synthesize_text
from stillhouse.errors import StillhouseError
from stillhouse.generation import request_pool
from stillhouse.generation.answer_logprobs import mean_log_probability
from stillhouse.generation.budget import Budget, Price, worst_case
from stillhouse.generation.estimate import estimate_requests
from stillhouse.generation.journal import Journal
from stillhouse.generation.request_pool import Pool
from stillhouse.teachers.http_link import Patience

PRICE = Price(input=10.0, output=30.0)
ASKED = 6
REDIRECTS = (301, 302, 303, 307, 308)
FEWEST = 10
"""This many characters of the key must not be written."""
AMPLE = 20.0
"""A budget, in multiples of a request's maximum cost, that covers all attempts of both runs."""
JOURNAL = "answers.sqlite"
PATIENCE = Patience(attempts=2, backoff=0.01)
TIMEOUT = 0.6
"""Timeout of a reply in seconds."""
Ask = Callable[[Path, str, float], None]
"""Sends all requests. Arguments: folder, URL of the server, budget in dollars."""


@dataclass
class Server:
    """A provider whose replies are faulty until it is healthy. bad: numbers of the requests with a
    faulty reply. billed: dollars."""

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
    if number % 18 == 17:
        return _redirected(chance, folder)
    fault = FAULTS[number // 2 % len(FAULTS)](chance)
    few = frozenset(chance.sample(range(ASKED), chance.randint(1, 3)))
    bad = chance.choice([few, frozenset(range(100))])
    server, room = Server(fault, bad), chance.choice([1.5, 3.5, 8.5, AMPLE])
    ask = _synthesize if number % 5 == 0 else _ask
    title = f"{fault.name}, for {len(bad)}, budget for {room:g}"
    title += ", by a recipe" if ask is _synthesize else ""
    return Trial(title, lambda: _problem(server, room, folder, ask), lambda found: found)


def _redirected(chance: random.Random, folder: Path) -> Trial:
    """A redirect to a different server, which would answer."""
    code = chance.choice(REDIRECTS)

    def read() -> str | None:
        with Stub() as other:
            fault = Fault("", lambda text: body(b"", code, location=other.url), (), billed=False)
            found = _problem(Server(fault, frozenset(range(100))), AMPLE, folder)
            return "prompts went to another server" if other.payloads else found

    return Trial(f"redirect {code}", read, lambda found: found)


def _problem(server: Server, room: float, folder: Path, ask: Ask | None = None) -> str | None:
    """Run twice with one budget, the second time with a healthy server; return what is wrong."""
    said: list[str] = []
    with Stub(server.reply, key=KEY) as stub, _impatient(), _shown_in(folder):
        limit = worst_case(requests(stub, 1)[0], PRICE).usd * room
        for healthy in (False, True):
            server.healthy = healthy
            try:
                (ask or _ask)(folder, stub.url, limit)
            except StillhouseError as error:
                said.append(str(error))
                if not error.where or not error.fix:
                    return f"unclear: {error}"
        said.append(notes_so_far())
    if server.billed > limit * (1 + 1e-9):
        return f"overspent: ${server.billed} of ${limit}"
    answered = _answered(folder / JOURNAL)
    if room == AMPLE and answered < ASKED:
        return f"{answered} of {ASKED} requests are answered by the healthy server"
    return _wrong_in_journal(folder / JOURNAL, server.fault) or _key_in(folder, said)


def _answered(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])


def _ask(folder: Path, url: str, limit: float) -> None:
    asked = requests(url, ASKED)
    with Journal(folder / JOURNAL) as journal:
        budget = Budget(max_usd=limit)
        budget.spent = estimate_requests(asked, journal, PRICE).spent
        run(
            journal, url, asked, concurrency=3, budget=budget, price=PRICE,
            timeout=on_busy_cores(TIMEOUT), key_env="KNOCKS_KEY", patience=PATIENCE,
        )  # fmt: skip


def _synthesize(folder: Path, url: str, limit: float) -> None:
    """Run `stillhouse synthesize`, including its output."""
    (folder / "prompts.txt").write_text("".join(f"question {n}\n" for n in range(ASKED)))
    api = {
        "base_url": url, "model": "teacher", "concurrency": 3, "timeout": on_busy_cores(TIMEOUT),
        "key_env": "KNOCKS_KEY", "price": asdict(PRICE),
    }  # fmt: skip
    section = {
        "teacher": {"api": api},
        "prompts": {"path": "prompts.txt"},
        "sampling": {"max_tokens": 20, "temperature": 0.5, "top_logprobs": 1},
        "filters": {"truncated": False, "refusals": False},
        "budget": {"max_usd": limit},
        "journal": JOURNAL,
    }
    data = {"sources": [{"kind": "jsonl", "path": "synthetic.jsonl"}], "context": 64}
    raw = tiny.recipe(folder, folder=str(folder / "run"), synthesize=section, data=data)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    with mock.patch.dict(Pool.__init__.__kwdefaults__, patience=PATIENCE):
        result = synthesize_text(recipe)
        print(result and result.lines(), flush=True)


def _wrong_in_journal(path: Path, fault: Fault) -> str | None:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT key, messages FROM answers").fetchall()
    with Journal(path) as journal:
        for key, messages in rows:
            answer = journal.get(key)
            assert answer is not None
            mean_log_probability(answer)
            right = text_for(json.loads(messages)[-1]["content"])
            if answer.text not in (right, *fault.texts) and "*" not in fault.texts:
                return f"a wrong answer: {answer.text[:100]!r}"
    return None


def _key_in(folder: Path, said: list[str]) -> str | None:
    """Find the key in messages, in rows of the journal, or anywhere in the folder's files."""
    with closing(sqlite3.connect(folder / JOURNAL)) as connection:
        for table in ("answers", "failures"):
            said += [str(row) for row in connection.execute(f"SELECT * FROM {table}")]
    files = [path for path in folder.rglob("*") if path.is_file()]
    for text in (*said, *(path.read_bytes().decode("latin-1") for path in files)):
        at = next((p for p in _plain(text) if KEY[:FEWEST] in p), None)
        if at is not None:
            start = at.find(KEY[:FEWEST])
            return f"the key is written: {at[max(0, start - 40) : start + 60]!r}"
    return None


def _plain(text: str) -> list[str]:
    """Return the text, and the text with one to four layers of escapes removed."""
    found = [text]
    for _ in range(4):
        text = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
        text = re.sub(r"\\+x([0-9a-fA-F]{2})", lambda m: chr(int(m[1], 16)), text)
        text = unquote(html.unescape(text)).replace("\\", "")
        found.append(text)
    return found


@contextmanager
def _shown_in(folder: Path) -> Iterator[None]:
    """Redirect the standard streams to files in the folder."""
    saved = {number: os.dup(number) for number in (1, 2)}
    try:
        for number in saved:
            with (folder / f"stream-{number}").open("ab") as file:
                os.dup2(file.fileno(), number)
        yield
    finally:
        for number, before in saved.items():
            os.dup2(before, number)
            os.close(before)


@contextmanager
def _impatient() -> Iterator[None]:
    """Give up after a second on a server that asks clients to slow down."""
    with (
        mock.patch.object(request_pool, "LONGEST_WAIT", 1.0),
        mock.patch.dict("os.environ", {"KNOCKS_KEY": KEY}),
    ):
        yield
