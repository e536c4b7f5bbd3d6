"""Choosing which of several answers to a text the student learns, by likelihood or by a judge."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stillhouse.answering.answer_stages import plan_answer_texts, plan_answers
from stillhouse.answering.answering_job import TRAIN, find_answering
from stillhouse.check import check_recipe
from stillhouse.commands import agree_to_spend
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import RecipeError, RunError
from stillhouse.pipeline.stage_plan import doing
from stillhouse.runfolder import RunFolder
from tests.answering import toys
from tests.generation.stub import Reply, Stub


def teacher(number: int, payload: dict[str, Any]) -> Reply:
    """Answers with the request's number; the larger it is modulo 3, the more likely the answer."""
    told = [{"token": "a", "logprob": number % 3 - 5.0, "bytes": [97], "top_logprobs": []}]
    return Reply(text=f"answer {number}", logprobs=told if payload.get("logprobs") else None)


def judge(number: int, payload: dict[str, Any]) -> Reply:
    """Prefers the answer with the larger number, in either position."""
    first, second = map(int, re.findall(r"answer (\d+)", payload["messages"][-1]["content"]))
    return Reply(text="A" if first > second else "B")


def kept(raw: dict[str, Any], folder: Path) -> list[str]:
    """The answers that the student would learn."""
    job = find_answering(toys.parsed(toys.clean(raw)), folder)
    do = doing(RunFolder(folder / "run"))
    stage = do(plan_answers(job, do(plan_answer_texts(job))))
    rows = (stage.path / TRAIN).read_text().splitlines()
    return [json.loads(row)["messages"][-1]["content"] for row in rows]


def recipe(folder: Path, url: str, choice: dict[str, Any]) -> dict[str, Any]:
    raw = toys.recipe(folder, "generate", **toys.api(folder, url))
    raw["teacher"] |= {"samples": 2, "sampling": {"temperature": 1.0, "max_tokens": 8}}
    raw["teacher"]["api"]["concurrency"] = 1
    raw["filters"] |= {"best_of": choice}
    return raw


def test_the_most_likely_answer_is_learned(tmp_path: Path) -> None:
    with Stub(teacher) as stub:
        found = kept(recipe(tmp_path, stub.url, {"kind": "likelihood"}), tmp_path)
    numbers = [int(text.split()[1]) for text in found]
    # With one request at a time, answers 2n and 2n + 1 are to the same text; ties go to the first.
    assert numbers == [max(n, n + 1, key=lambda one: one % 3) for n in range(0, 32, 2)]
    assert len(stub.payloads) == 2 * 16 + 4, "a test text needs a single answer"


@pytest.mark.run
def test_a_judge_chooses_and_no_request_is_repeated(tmp_path: Path) -> None:
    with Stub(teacher) as stub, Stub(judge) as other:
        api = {"base_url": other.url, "model": "teacher"}
        choice = {"kind": "judge", "compare": "pairs", "teacher": {"api": api}}
        raw = recipe(tmp_path, stub.url, choice)
        found = kept(raw, tmp_path)
        assert [int(text.split()[1]) for text in found] == list(range(1, 32, 2))
        assert len(other.payloads) == 2 * 16
        raw["filters"]["truncated"] = True  # so that the stage runs again
        assert kept(raw, tmp_path) == found
        assert (len(stub.payloads), len(other.payloads)) == (36, 32)


def test_a_judges_budget_stops_the_run(tmp_path: Path) -> None:
    with Stub(teacher) as stub, Stub(judge) as other:
        api = {"base_url": other.url, "model": "teacher"}
        budget = {"max_tokens": 500}
        choice = {"kind": "judge", "compare": "pairs", "teacher": {"api": api}, "budget": budget}
        with pytest.raises(RunError, match="judge's budget"):
            kept(recipe(tmp_path, stub.url, choice), tmp_path)
        assert 0 < len(other.payloads) < 32


def test_check_counts_the_verdicts_and_a_paid_judge_needs_confirmation(tmp_path: Path) -> None:
    api = {"base_url": "http://127.0.0.1:9/v1", "model": "judge", "key_env": "JUDGE_KEY"}
    choice = {"kind": "judge", "teacher": {"api": api}}
    raw = recipe(tmp_path, "http://127.0.0.1:9/v1", choice)
    parsed = parse_recipe(toys.clean(raw))
    told = {one.topic: one.text for one in check_recipe(parsed, base=tmp_path)}
    assert told["judge"] == "at most 32 requests to the judge"
    with pytest.raises(RecipeError, match="the judge chooses"):
        agree_to_spend(parsed, base=tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 1}, "several answers"),
        ({}, "the judge has no model"),
    ],
    ids=["one answer", "no judge"],
)
def test_an_invalid_choice_is_a_clear_error(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    raw = recipe(tmp_path, "http://x", {"kind": "judge", "teacher": {"local": {}}})
    raw["teacher"] |= changes
    with pytest.raises(RecipeError, match=said):
        parse_recipe(toys.clean(raw))
