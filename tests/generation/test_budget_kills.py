"""A budget is never exceeded, however often the process is killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from stillhouse.generation.budget import Budget, Price, worst_case
from stillhouse.generation.estimate import estimate_requests
from stillhouse.generation.journal import Journal
from tests.forks import Fork
from tests.generation.pools import requests, run
from tests.generation.stub import Reply, Stub

PRICE = Price(input=10.0, output=30.0)


def send_within_budget(path: Path, url: str, usd: float) -> None:
    """Send requests as a run does: what the journal records for them counts as spent."""
    asked = requests(url, 60)
    with Journal(path) as journal:
        budget = Budget(max_usd=usd)
        budget.spent = estimate_requests(asked, journal, PRICE).spent
        run(journal, url, asked, concurrency=4, budget=budget, price=PRICE)


@pytest.mark.run
def test_requests_in_flight_at_a_kill_count_as_spent(tmp_path: Path) -> None:
    with Stub(lambda number, payload: Reply(how="hang")) as stub:
        worst = worst_case(requests(stub, 1)[0], PRICE)
        arguments = (tmp_path / "j.sqlite", stub.url, worst.usd * 7.5)
        for sent in (4, 7):  # four in parallel; the rest of the budget allows three
            child = Fork(send_within_budget, *arguments)
            deadline = time.monotonic() + 60
            while len(stub.payloads) < sent and time.monotonic() < deadline:
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
            child.wait(timeout=60)
        child = Fork(send_within_budget, *arguments)  # sends nothing and ends by itself
        assert child.wait(timeout=60) == 0, child.communicate()
        assert len(stub.payloads) == 7
