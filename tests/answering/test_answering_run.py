"""Whole runs of students that answer, on tiny models: JSON from an API, free text from a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from stillhouse.answering import run_answering
from stillhouse.check import check_recipe
from stillhouse.cli import app
from stillhouse.errors import DataError, RecipeError, RunError, StillhouseError
from stillhouse.recipe import parse_answering_recipe
from stillhouse.spending import agree_to_task
from tests.answering import toys
from tests.synthesis.stub import Reply, Stub

pytestmark = pytest.mark.usefixtures("in_process")


def run(raw: dict[str, Any]) -> Any:
    return run_answering(parse_answering_recipe(toys.clean(raw)))


def extraction(number: int, payload: dict[str, Any]) -> Reply:
    """JSON, every fifth time with an age that is no number."""
    found = toys.truth(payload["messages"][-1]["content"])
    if number % 5 == 4:
        found["age"] = "old"
    return Reply(text=json.dumps(found))


def test_json_of_an_api_is_checked_learnt_and_measured_beside_every_baseline(
    tmp_path: Path,
) -> None:
    gold = [{"path": str(tmp_path / "texts.jsonl"), "label": "gold"}]
    with Stub(extraction) as stub:
        raw = toys.recipe(tmp_path, "extract", data={"texts": gold}, **toys.api(tmp_path, stub.url))
        result = run(raw)
        assert all(stage.reused for stage in run(raw).stages)
        assert len(stub.payloads) == 20
    found = result.evaluation
    assert [one.role for one in found.results] == ["teacher", "untrained", "student", "fine_tuned"]
    teacher = found.of("teacher").figures
    # What is valid is right: 4 test texts, and the teacher errs in every fifth of 20 answers.
    assert teacher["exact"] == teacher["valid"]
    assert teacher["agreement_f1"] == 1.0
    assert set(found.of("teacher").fields) == {"name", "age"}
    answers = next(stage for stage in result.stages if stage.name == "answers").summary
    assert answers["kept"] + answers["taken"]["json_schema"] == 16
    assert answers["taken"]["json_schema"] == 4 - round(4 * (1 - teacher["valid"]))
    page = result.report.read_text()
    assert "Field by field" in page
    card = (result.model / "README.md").read_text()
    assert "F1 of the fields, to the true answers" in card
    assert "**the provider's terms**. Warning: terms of an API" in card
    for part in ("| model.safetensors | ", "This export differs", "## Limits", "training texts"):
        assert part in card
    path = tmp_path / "recipe.yaml"
    path.write_text((tmp_path / "run" / "recipe.yaml").read_text())
    warned = [one.text for one in check_recipe(path) if one.topic == "license"]
    assert len(warned) == 2, "the API, and the model that the student starts from"


def test_a_student_learns_to_write_the_teachers_json(tmp_path: Path) -> None:
    """One answer to everything, so that even a random model can learn it."""
    said = '{"name": "Al", "age": 3}'
    with Stub(lambda number, payload: Reply(text=said)) as stub:
        raw = toys.recipe(tmp_path, "extract", **toys.api(tmp_path, stub.url))
        raw["train"] |= {"epochs": 60, "learning_rate": 1e-2}
        result = run(raw)
    untrained, student = (result.evaluation.of(role).figures for role in ("untrained", "student"))
    assert (untrained["valid"], student["valid"]) == (0.0, 1.0)
    assert student["agreement_f1"] == 1.0
    answer = CliRunner().invoke(app, ["predict", str(tmp_path / "run")], input="Zoe is 9.\n")
    row = json.loads(answer.stdout)
    assert row == {"text": "Zoe is 9.", "answer": said, "valid": True, "value": json.loads(said)}


def test_free_text_of_a_model_is_learnt_by_its_distributions(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def length(text, answer, gold):\n    return len(answer)\n")
    raw = toys.recipe(tmp_path, "generate", evaluate={"scorer": f"{tmp_path / 'score.py'}:length"})
    result = run(raw)
    found = {one.role: one.figures for one in result.evaluation.results}
    assert set(found) == {"teacher", "untrained", "student"}
    assert all(figures["surprise"] > 0 for figures in found.values())
    assert found["teacher"]["agreement"] == 1.0
    assert found["teacher"]["score"] > 0


def test_a_judge_that_prefers_the_first_answer_prefers_none(tmp_path: Path) -> None:
    with Stub(lambda number, payload: Reply(text="A")) as stub:
        judge = {"api": {"base_url": stub.url, "model": "teacher"}}
        result = run(toys.recipe(tmp_path, "generate", evaluate={"judge": judge}))
    figures = result.evaluation.of("student").figures
    assert (figures["preferred"], figures["consistent"], figures["judge_read"]) == (0.5, 0.0, 1.0)


def test_check_and_preview_know_what_is_asked(tmp_path: Path) -> None:
    raw = toys.recipe(tmp_path, "extract", task={"student_sees": "prompt"})
    raw["task"] |= {"system": "Be exact.", "examples": [{"text": "Hi", "answer": "{}"}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    found = {(one.level, one.topic): one.text for one in check_recipe(path)}
    assert found[("ok", "texts")] == "16 to learn from, 4 to measure on"
    assert "0 of 20 questions are answered" in found[("estimate", "answers")]
    assert not [text for (level, _), text in found.items() if level == "error"]
    shown = CliRunner().invoke(app, ["preview", str(path), "--rows", "1"])
    assert shown.exit_code == 0
    assert "Be exact." in shown.stdout
    assert "About: Hi" in shown.stdout


def test_a_budget_stops_the_run_and_loses_nothing(tmp_path: Path) -> None:
    with Stub(extraction) as stub:
        raw = toys.recipe(tmp_path, "extract", **toys.api(tmp_path, stub.url))
        raw["teacher"]["budget"] = {"max_tokens": 200}
        with pytest.raises(RunError, match="budget is used up"):
            run(raw)
        paid = len(stub.payloads)
        assert 0 < paid < 20
        raw["teacher"]["budget"] = None
        run(raw)
        assert len(stub.payloads) == 20


def test_an_api_is_paid_without_a_budget_only_when_that_is_agreed_to(tmp_path: Path) -> None:
    raw = toys.recipe(tmp_path, "extract", **toys.api(tmp_path, "http://127.0.0.1:9/v1"))
    raw["teacher"]["api"] |= {"price": {"input": 1.0, "output": 2.0}}
    recipe = parse_answering_recipe(toys.clean(raw))
    asked: list[str] = []
    with pytest.raises(RecipeError, match="20 requests take at most"):
        agree_to_task(recipe, tmp_path, None)
    assert not agree_to_task(recipe, tmp_path, lambda question: bool(asked.append(question)))
    assert "Ask?" in asked[0]
    raw["teacher"]["budget"] = {"max_usd": 1.0}
    assert agree_to_task(parse_answering_recipe(toys.clean(raw)), tmp_path, None)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"task": {"json_schema": "nowhere.json"}}, DataError, "cannot be read"),
        ({"task": {"prompt": "nothing"}}, RecipeError, "no {text}"),
        ({"evaluate": {"scorer": "score"}}, RecipeError, "path.py:function"),
        ({"evaluate": {"judge": {"model": "x"}}}, RecipeError, "kind: generate"),
        (
            {"teacher": {"model": None, "api": {"base_url": "http://x/v1", "model": "x"}}},
            RecipeError,
            "a model of its own",
        ),
    ],
    ids=["schema", "prompt", "scorer", "judge", "an api's student"],
)
def test_one_clear_message(
    tmp_path: Path, changes: dict[str, Any], error: type[StillhouseError], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(toys.recipe(tmp_path, "extract", **changes))


def test_a_true_answer_that_the_schema_forbids_is_named(tmp_path: Path) -> None:
    gold = [{"path": str(tmp_path / "texts.jsonl"), "label": "gold"}]
    raw = toys.recipe(tmp_path, "extract", data={"texts": gold})
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": "Gus is 9.", "gold": {"name": "Gus"}}\n')
    with pytest.raises(DataError, match="does not fit the schema") as caught:
        run(raw)
    assert caught.value.where is not None
    assert caught.value.where.endswith("texts.jsonl:21")
