"""The cost of a task's answers, and the possible cost of lost ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.generation.answer_requests import answer_all, cost_line
from stillhouse.generation.budget import Price, worst_case
from stillhouse.generation.generation_config import ApiTeacher, BudgetRecipe
from stillhouse.generation.text_teacher import ApiText
from tests.generation.pools import once, requests
from tests.generation.stub import Reply, Stub


@pytest.mark.run
def test_the_cost_includes_lost_answers_and_counts_equal_requests_once(tmp_path: Path) -> None:
    with Stub(once(Reply(how="cut"))) as stub:
        price = {"input": 10.0, "output": 30.0}
        api = ApiTeacher.model_validate({"base_url": stub.url, "model": "teacher", "price": price})
        asked = requests(stub, 3)
        source = ApiText(api, {"max_tokens": 20}, BudgetRecipe())
        found = answer_all(source, lambda: iter([*asked, asked[0]]), tmp_path / "j.sqlite", "b")
        again = answer_all(source, lambda: iter(asked), tmp_path / "j.sqlite", "b")
    one = found.found[0]
    assert one is not None
    assert one.cost is not None
    assert found.found == [one, *found.found[1:3], one]
    assert found.usd == pytest.approx(3 * one.cost)
    assert found.lost == again.lost == worst_case(asked[0], Price(10.0, 30.0))
    assert cost_line(again.cost()) == (
        f"${3 * one.cost:,.4f}; at most ${found.lost.usd:,.4f}, {found.lost.tokens:,} tokens "
        "were also billed for lost answers"
    )


def test_the_cost_line_of_a_summary_without_lost_answers() -> None:
    assert cost_line({"usd": 0.5}) == "$0.5000"
    assert cost_line({"usd": None}) == "unknown"
