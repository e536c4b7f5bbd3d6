"""Computing metrics from the answers of an evaluated model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stillhouse.answering.answering_evaluation import (
    answer_figures,
    answers_in_order,
    plan_answers_evaluation,
    read_json,
    request_for,
)
from stillhouse.answering.answering_job import find_answering
from stillhouse.generation.request import Answer, Failure
from stillhouse.synthesis.filters import json_schema
from stillhouse.tasks.labeled_texts import LabeledText
from tests import tiny
from tests.answering import toys


def ordered(texts: list[str | None]) -> list[str]:
    """What `answers_in_order` returns for a model's texts; None stands for a prompt that is too
    long."""
    requests = [
        request_for(({"role": "user", "content": str(n)},), "student", 9) for n in range(len(texts))
    ]
    outcomes = [Failure("refused", "too long") if t is None else Answer(t) for t in texts]
    pairs = list(zip(requests, outcomes, strict=True))
    generator: Any = SimpleNamespace(answers=lambda asked: iter(pairs[::-1]))
    return answers_in_order(cast(Any, generator), requests)


def test_reasoning_is_not_part_of_an_answer_and_truncated_reasoning_has_no_answer() -> None:
    thought = "<think>\nhm\n</think>\n\nyes"
    assert ordered([thought, " no ", "<think>and so", None]) == ["yes", "no", "", ""]


def test_json_after_reasoning_is_read() -> None:
    validity = json_schema(toys.SCHEMA)
    text = '<think>{"name": 1}</think> {"name": "Al", "age": 3}'
    assert read_json(text, validity) == (True, {"name": "Al", "age": 3})
    assert read_json("<think>Al</think> Al", validity) == (False, None)


def test_null_is_a_value_if_the_schema_allows_it() -> None:
    assert read_json("null", json_schema({"type": ["object", "null"]})) == (True, None)
    assert read_json("null", json_schema({"type": "object"})) == (False, None)


def test_two_empty_answers_do_not_agree() -> None:
    rows = [LabeledText(text) for text in "abcd"]
    taught = ["yes", None, "", "no"]
    figures, _ = answer_figures(None, rows, ["yes", "", "", "maybe"], taught)
    assert figures == {"agreement": 0.5}


def test_an_extraction_is_exact_only_if_its_value_is_equal() -> None:
    validity = json_schema({"type": "object"})
    gold = ['{"tags": ["x", "y"]}', '{"age": 3}', '{"age": 3}', "{}", None]
    rows = [LabeledText("a", one) for one in gold]
    answers = ['{"tags": ["y", "x"]}', '{"age": 3.0}', '```json\n{"age": 3}\n```', "no", "{}"]
    figures, _ = answer_figures(validity, rows, answers, [None] * 5)
    assert figures == {"valid": 0.8, "field_f1": 1.0, "exact": 0.5}


def test_the_evaluation_depends_on_the_content_of_its_scorer_and_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    scorer = tmp_path / "score.py"
    section = {"scorer": "~/score.py:f", "judge": {"model": str(tmp_path / "judge")}}
    job = find_answering(toys.parsed(toys.recipe(tmp_path, "generate", evaluate=section)), tmp_path)
    stage: Any = SimpleNamespace(digest="0")
    found = []
    for seed, source in enumerate(("f = len", "f = max", "f = max")):
        scorer.write_text(source)
        tiny.save_model(tmp_path / "judge", seed=min(seed, 1))
        plan = plan_answers_evaluation(job, stage, stage, stage, stage, None)
        found.append((plan.inputs["scorer"], plan.inputs["judge"]))
    assert found[1] == found[2]
    assert all(one != other for one, other in zip(found[0], found[1], strict=True))
