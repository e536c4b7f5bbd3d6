"""Synthesis as the first stage of a run, and the confirmation before money is spent."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import stillhouse
from stillhouse.check import check_recipe
from stillhouse.cli import app
from stillhouse.commands import agree_to_spend, prepare_data, synthesize_text
from stillhouse.errors import DataError, RecipeError
from stillhouse.generation.budget import Spending
from stillhouse.generation.estimate import Estimate
from stillhouse.pipeline.kind import RunResult
from tests import forks, tiny
from tests.generation.pools import committed
from tests.generation.stub import Reply, Stub

pytestmark = pytest.mark.run

PRICE = {"input": 1000.0, "output": 10_000.0}
OUT = {"kind": "jsonl", "path": "synthetic.jsonl"}


def recipe(folder: Path, teacher: dict[str, Any], /, **changes: Any) -> dict[str, Any]:
    """The recipe of a tiny run whose only text is a teacher's answers to 80 prompts."""
    if not (folder / "prompts.txt").exists():
        (folder / "prompts.txt").write_text("".join(f"question {n}\n" for n in range(80)))
    section = {
        "teacher": teacher,
        "prompts": {"path": "prompts.txt"},
        "sampling": {"max_tokens": 8},
        "filters": {"truncated": False, "refusals": False},
        **changes.pop("synthesize", {}),
    }
    data = {"sources": [OUT], "context": 64, "heldout_tokens": 256, "train_tokens": None}
    folder_of_run = str(folder / "runs" / "tiny")
    train = {"max_steps": 2}
    sections = {"folder": folder_of_run, "synthesize": section, "data": data, "train": train}
    return tiny.recipe(folder, **{**sections, **changes})


def api(url: str, **changes: Any) -> dict[str, Any]:
    return {"api": {"base_url": url, "model": "teacher", "concurrency": 4, **changes}}


def write(folder: Path, raw: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run(folder: Path, raw: dict[str, Any]) -> RunResult:
    result = stillhouse.run(raw, base=folder)
    assert result is not None
    return result


def echo(number: int, payload: dict[str, Any]) -> Reply:
    return Reply(text=f"answer to {payload['messages'][-1]['content']}")


def reused(result: RunResult) -> dict[str, bool]:
    """Whether each stage was reused."""
    return {stage.name: stage.reused for stage in result.stages}


def test_a_run_trains_on_synthesized_text_and_a_rerun_reuses_every_stage(tmp_path: Path) -> None:
    raw = recipe(tmp_path, {"local": {"precision": "float32"}})
    first = run(tmp_path, raw)
    assert list(reused(first))[:3] == ["synthesis", "data", "student"]
    assert not any(reused(first).values())
    synthesis = first.stages[0]
    assert synthesis.summary["kept"] == 80
    assert synthesis.cost.flops > 0
    published = (tmp_path / "synthetic.jsonl").read_bytes()
    assert published == (tmp_path / "runs/tiny/synthesis/synthetic.jsonl").read_bytes()
    assert (
        published.count(b"\n")
        == first.stages[1].summary["train"]["documents"]
        + (first.stages[1].summary["heldout"]["documents"])
    )
    again = run(tmp_path, raw)
    assert all(reused(again).values())


def test_later_stages_run_again_only_if_the_text_changes(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        raw = recipe(tmp_path, api(stub.url))
        run(tmp_path, raw)
        assert len(stub.payloads) == 80
        # The new filter drops nothing, so the text is the same and no later stage runs again.
        raw["synthesize"]["filters"]["max_characters"] = 1000
        same = reused(run(tmp_path, raw))
        assert same.pop("synthesis") is False
        assert same.pop("report") is False, "the report shows the recipe"
        assert all(same.values())
        # Training reads the stage's text, not the copy, which something else may have overwritten.
        (tmp_path / "synthetic.jsonl").write_text("{}")
        assert all(reused(run(tmp_path, raw)).values())
        assert (tmp_path / "synthetic.jsonl").read_text() == "{}"
        (tmp_path / "synthetic.jsonl").unlink()
        run(tmp_path, raw)
        assert (tmp_path / "synthetic.jsonl").read_text().count("answer to") == 80
        raw["synthesize"]["filters"]["forbid_pattern"] = "question 7$"
        other = reused(run(tmp_path, raw))
        assert not other["data"]
        assert not other["train"]
        assert len(stub.payloads) == 80, "the journal has every answer"


def test_a_run_killed_during_requests_repeats_only_those_in_flight(tmp_path: Path) -> None:
    """The run is killed with 40 answers in the journal and four requests in flight."""
    released = threading.Event()

    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(text=f"answer {number}", when=lambda: number < 40 or released.is_set())

    with Stub(script) as stub:
        raw = recipe(tmp_path, api(stub.url))
        process = forks.stillhouse("run", str(write(tmp_path, raw)))
        journal = tmp_path / "runs" / "answers.sqlite"
        while len(stub.payloads) < 44 or committed(journal) < 40:
            time.sleep(0.01)
            assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
        released.set()
        assert not list((tmp_path / "runs/tiny/stages").glob("synthesis-*"))
        sent = len(stub.payloads)
        assert synthesize_text(tmp_path / "recipe.yaml").kept == 80
        assert len(stub.payloads) <= 80 + 4
        assert len(stub.payloads) < 80 + sent


def test_failed_requests_are_sent_again_by_synthesize_only(tmp_path: Path) -> None:
    fails = [3, 5]

    def script(number: int, payload: dict[str, Any]) -> Reply:
        which = int(payload["messages"][-1]["content"].split()[1])
        return Reply(status=400, body=b"no") if which in fails else Reply(text=f"answer {which}")

    with Stub(script) as stub:
        path = write(tmp_path, recipe(tmp_path, api(stub.url)))
        first = synthesize_text(path)
        assert (first.answered, first.failed, first.kept) == (78, 2, 78)
        prepare_data(path)
        asked = len(stub.payloads)
        prepare_data(path)
        assert len(stub.payloads) == asked
        fails.clear()
        second = synthesize_text(path)
        assert (second.answered, second.new, second.kept) == (80, 2, 80)
        assert len((tmp_path / "synthetic.jsonl").read_text().splitlines()) == 80
        assert synthesize_text(path).new == 0


def test_a_run_that_reads_other_text_synthesizes_nothing(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        raw = recipe(tmp_path, api(stub.url))
        raw["data"]["sources"] = [
            {"kind": "text", "path": str(tmp_path / "text.txt"), "documents": "line"}
        ]
        assert "synthesis" not in reused(run(tmp_path, raw))
        assert stub.payloads == []
        found = check_recipe(write(tmp_path, raw))
    warnings = [finding.text for finding in found if finding.level == "warning"]
    assert (
        "no data source names synthetic.jsonl, so `stillhouse run` synthesizes nothing" in warnings
    )


def test_check_reports_the_parts_of_a_prompt_that_are_not_sent(tmp_path: Path) -> None:
    rows = [{"instruction": "Translate.", "input": f"Tag {n}"} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Stub(echo) as stub:
        for key, noted in (("instruction", True), ("prompt", False)):
            prompts = {"path": "rows.jsonl", "key": key}
            raw = recipe(tmp_path, api(stub.url), synthesize={"prompts": prompts})
            found = {finding.topic: finding for finding in check_recipe(write(tmp_path, raw))}
            assert ("prompts" in found) is noted
            if noted:
                assert found["prompts"].fix == "remove synthesize.prompts.key to ask all of it"


def test_previewing_the_data_spends_nothing(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        path = write(tmp_path, recipe(tmp_path, api(stub.url)))
        with pytest.raises(DataError, match="not synthesized yet") as caught:
            prepare_data(path)
        assert stub.payloads == []
    assert "stillhouse synthesize" in str(caught.value.fix)


# --- costs -----------------------------------------------------------------------------------


def test_check_estimates_the_cost_from_a_few_calls_and_keeps_their_answers(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(text=f"answer {number}", usage=(10, 4 + number % 3))

    with Stub(script) as stub:
        path = write(tmp_path, recipe(tmp_path, api(stub.url, price=PRICE)))
        before = {finding.topic: finding for finding in check_recipe(path)}
        assert "cannot be estimated" in before["data"].text
        assert "training" not in before
        found = {finding.topic: finding for finding in check_recipe(path, calls=6)}
        asked = [payload["messages"][-1]["content"] for payload in stub.payloads]
        assert sorted(asked) == sorted(f"question {n}" for n in (0, 13, 26, 40, 53, 66))
        assert found["synthesis"].text.startswith(
            "6 of 80 requests are answered; the rest takes about 1,110 tokens, $4.44 (95% likely: "
        )
        assert "training" in found
        synthesize_text(path)
        assert len(stub.payloads) == 80


def test_the_cost_range_is_a_prediction_interval() -> None:
    """Compared with a calculation by hand: three answers cost $9, $10, and $11; six are missing."""
    known = Estimate(9, 6, Spending(30, 30.0), Spending(999, 999.0), (302.0, 302.0))
    assert known.likely == Spending(60, 60.0)
    half = 4.3027 * 1.0 * (6 + 36 / 3) ** 0.5
    low, high = known.between or (Spending(), Spending())
    assert low.usd == pytest.approx(60 - half)
    assert high.usd == pytest.approx(60 + half)
    limited = Estimate(9, 6, Spending(30, 30.0), Spending(70, 70.0), (302.0, 302.0))
    low, high = limited.between or (Spending(), Spending())
    assert low.tokens == round(60 - half)
    assert low.usd == pytest.approx(60 - half)
    assert high == Spending(70, 70.0)
    assert Estimate(9, 8, Spending(10, 10.0), Spending(999, 999.0), (100.0, 100.0)).between is None


@pytest.mark.parametrize(
    ("changes", "asks"),
    [
        ({"price": PRICE}, True),
        ({"price": {"input": 0.0, "output": 0.0}}, False),
        ({"key_env": "TINY_KEY"}, True),
        ({}, False),
    ],
    ids=["a price", "free", "a key, and the price unknown", "a server that needs no key"],
)
def test_spending_without_a_budget_needs_confirmation(
    tmp_path: Path, changes: dict[str, Any], asks: bool
) -> None:
    questions: list[str] = []

    def confirm(question: str) -> bool:
        questions.append(question)
        return False

    raw = recipe(tmp_path, api("http://127.0.0.1:1/v1", **changes))
    path = write(tmp_path, raw)
    for command in ("run", "synthesize"):
        assert agree_to_spend(path, synthesize=command == "synthesize", confirm=confirm) is not asks
    assert len(questions) == 2 * asks
    assert all(question.startswith("0 of 80 requests are answered") for question in questions)
    budget = ["synthesize.budget.max_tokens=100"]
    assert agree_to_spend(path, budget)
    if asks:
        with pytest.raises(RecipeError, match="spend on an API without a limit") as caught:
            agree_to_spend(path)
        assert "--yes" in str(caught.value.fix)


def test_without_a_terminal_the_command_line_spends_only_with_yes(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        path = str(write(tmp_path, recipe(tmp_path, api(stub.url, price=PRICE))))
        refused = CliRunner().invoke(app, ["synthesize", path])
        assert isinstance(refused.exception, RecipeError)
        assert stub.payloads == []
        agreed = CliRunner().invoke(app, ["synthesize", path, "--yes"])
        assert agreed.exit_code == 0
        assert len(stub.payloads) == 80
        # Nothing is left to pay for, so no confirmation is needed.
        assert CliRunner().invoke(app, ["synthesize", path]).exit_code == 0
    summary = json.loads((tmp_path / "runs/tiny/synthesis/summary.json").read_text())
    assert summary["usd"] == pytest.approx(80 * (10 * 1000 + 5 * 10_000) / 1e6)
