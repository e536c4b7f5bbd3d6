"""Complete extract and generate runs on tiny models, with local teachers and APIs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from stillhouse.answering import answer_stages
from stillhouse.check import check_recipe
from stillhouse.cli import app
from stillhouse.commands import agree_to_spend
from stillhouse.commands import run as run_answering
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.data.row_reader import read_rows
from stillhouse.errors import DataError, RecipeError, RunError, StillhouseError
from stillhouse.generation.answer_requests import Answers
from stillhouse.generation.budget import Spending
from stillhouse.generation.request import Answer
from stillhouse.training.checkpoints import METRICS, read_metrics
from tests.answering import toys
from tests.generation.stub import Reply, Stub, error

pytestmark = pytest.mark.run

KEY = "sk-very-secret-1234567890"


def run(raw: dict[str, Any]) -> Any:
    return run_answering(parse_recipe(toys.clean(raw)))


def extraction(number: int, payload: dict[str, Any]) -> Reply:
    """Correct JSON, except that the age in every fifth answer is not a number."""
    found = toys.truth(payload["messages"][-1]["content"])
    if number % 5 == 4:
        found["age"] = "old"
    return Reply(text=json.dumps(found))


@pytest.mark.usefixtures("charts")
def test_json_from_an_api_is_validated_learned_and_compared_with_every_baseline(
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
    # Every valid answer is correct. Of all 20 answers, every fifth is invalid; 4 are to test texts.
    assert teacher["exact"] == teacher["valid"]
    assert teacher["agreement_f1"] == 1.0
    assert set(found.of("teacher").fields) == {"name", "age"}
    answers = next(stage for stage in result.stages if stage.name == "answers").summary
    assert answers["kept"] + answers["dropped"]["json_schema"] == 16
    assert answers["dropped"]["json_schema"] == 4 - round(4 * (1 - teacher["valid"]))
    page = result.report.read_text()
    assert "<path" in page
    assert {"Field F1: name", "Field F1: age"} <= set(re.findall("Field F1: [a-z]+", page))
    card = (result.model / "README.md").read_text()
    assert "Field F1, reference answers" in card
    assert "**the provider's terms**. Warning: an API's terms" in card
    for part in ("| model.safetensors | ", "This export (", "## Limits", "training texts"):
        assert part in card
    path = tmp_path / "recipe.yaml"
    path.write_text((tmp_path / "run" / "recipe.yaml").read_text())
    warned = [one.text for one in check_recipe(path) if one.topic == "license"]
    assert len(warned) == 2, "the API, and the model that the student starts from"


def test_a_student_learns_to_write_the_teachers_json(tmp_path: Path) -> None:
    """The teacher gives every text the same answer, so that even a random model can learn it."""
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


SCORER = """from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Length:
    of: int

def length(text, answer, gold):
    return Length(len(answer)).of
"""


def test_free_text_of_a_local_teacher_is_learned_from_its_distributions(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(SCORER)
    raw = toys.recipe(tmp_path, "generate", evaluate={"scorer": f"{tmp_path / 'score.py'}:length"})
    result = run(raw)
    found = {one.role: one.figures for one in result.evaluation.results}
    assert set(found) == {"teacher", "untrained", "student"}
    assert all(figures["surprise"] > 0 for figures in found.values())
    assert found["teacher"]["agreement"] == 1.0
    assert found["teacher"]["score"] > 0


def test_a_judge_that_always_prefers_the_first_answer_has_no_preference(tmp_path: Path) -> None:
    with Stub(lambda number, payload: Reply(text="A")) as stub:
        judge = {"api": {"base_url": stub.url, "model": "teacher"}}
        result = run(toys.recipe(tmp_path, "generate", evaluate={"judge": judge}))
    figures = result.evaluation.of("student").figures
    assert (figures["preferred"], figures["consistent"], figures["judge_read"]) == (0.5, 0.0, 1.0)


def test_a_verdict_is_read_after_the_reasoning_of_a_judge(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(text="<think>Is A better, or B? A tie?</think>\n\nTie")

    with Stub(script) as stub:
        judge = {
            "api": {"base_url": stub.url, "model": "teacher"},
            "sampling": {"temperature": None, "max_tokens": 300, "extra": {"seed": 3}},
        }
        result = run(toys.recipe(tmp_path, "generate", evaluate={"judge": judge}))
        sent = stub.payloads[0]
    figures = result.evaluation.of("student").figures
    assert (figures["judge_read"], figures["preferred"], figures["consistent"]) == (1.0, 0.5, 1.0)
    assert (sent["max_tokens"], sent["seed"], "temperature" in sent) == (300, 3, False)


REASONED = '<think>\nA name and a number.\n</think>\n\n{"name": "Al", "age": 3}'


@pytest.mark.parametrize(
    "reply",
    [
        {"text": REASONED},
        {"text": REASONED.removeprefix("<think>\n")},  # the prompt contains the opening tag
        {"text": REASONED.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")},
        {"text": REASONED.rpartition("\n")[2], "message": {"reasoning_content": "A name."}},
    ],
    ids=["think", "closed", "[THINK]", "a key"],
)
def test_the_student_does_not_learn_reasoning(tmp_path: Path, reply: dict[str, Any]) -> None:
    with Stub(lambda number, payload: Reply(**reply)) as stub:
        result = run(toys.recipe(tmp_path, "extract", **toys.api(tmp_path, stub.url)))
    answers = next(stage for stage in result.stages if stage.name == "answers")
    row = json.loads((answers.path / "train.jsonl").read_text().partition("\n")[0])
    assert row["messages"][-1]["content"] == '{"name": "Al", "age": 3}'
    assert result.evaluation.of("teacher").figures["valid"] == 1.0


def test_reasoning_that_is_cut_off_needs_a_higher_limit(tmp_path: Path) -> None:
    reply = Reply(text="<think>Al, or Alex? He is", finish_reason="length")
    with Stub(lambda number, payload: reply) as stub:
        raw = toys.recipe(tmp_path, "extract", **toys.api(tmp_path, stub.url))
        with pytest.raises(DataError, match="no answer is left") as error:
            run(raw)
    assert str(error.value.fix).startswith("raise teacher.sampling.max_tokens, which cut off 16")


@pytest.mark.parametrize("alone", [False, True], ids=["distributions", "text alone"])
def test_learning_distributions_without_the_reasoning_before_them_is_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    alone: bool,
) -> None:
    answers = Answers([Answer(REASONED)] * 20, 0, 0.0, Spending())
    monkeypatch.setattr(answer_stages, "answer_all", lambda *_: answers)
    raw = toys.recipe(tmp_path, "extract")
    if alone:
        raw["objective"] = {"terms": [{"divergence": "cross_entropy"}]}
    run(raw)
    said = " ".join(capsys.readouterr().err.split())
    assert ("reasons before 20 of 20 answers" in said) is not alone


def test_check_and_preview_show_the_requests(tmp_path: Path) -> None:
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


def test_check_reads_the_texts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(path: Path, **options: Any) -> Any:
        read.append(path.name)
        return read_rows(path, **options)

    monkeypatch.setattr("stillhouse.tasks.labeled_texts.read_rows", counted)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toys.recipe(tmp_path, "extract")))
    assert not [one for one in check_recipe(path) if one.level == "error"]
    assert read
    assert len(read) == len(set(read))


def test_calls_made_by_check_are_not_repeated_by_the_run(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with Stub(extraction) as stub:
        raw = toys.recipe(tmp_path, "extract", **toys.api(tmp_path, stub.url))
        path.write_text(yaml.safe_dump(toys.clean(raw)))
        found = {one.topic: one.text for one in check_recipe(path, calls=3)}
        assert found["answers"].startswith(
            "3 of 20 questions are answered; the rest takes about 255 tokens, price unknown"
        )
        assert len(stub.payloads) == 3
        run(raw)
        assert len(stub.payloads) == 20


def test_a_budget_stops_the_run_and_answers_are_kept(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["extract", "generate"])
def test_no_file_of_a_run_contains_the_api_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Not even if the teacher repeats it in an answer and in an error message, and a judge in its
    verdicts."""
    monkeypatch.setenv("TEACHER_KEY", KEY)

    def script(number: int, payload: dict[str, Any]) -> Reply:
        if number == 0:
            return error(400, f"you sent {KEY}")
        said = extraction(number, payload).text if kind == "extract" else f"answer {number}"
        return Reply(text=KEY if number == 1 else said)

    def judge(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(text=f"{KEY}: A")

    with Stub(script, key=KEY) as stub, Stub(judge, key=KEY) as other:
        raw = toys.recipe(tmp_path, kind, **toys.api(tmp_path, stub.url))
        raw["teacher"]["api"]["key_env"] = "TEACHER_KEY"
        raw["train"]["epochs"] = 1
        if kind == "generate":
            api = {"base_url": other.url, "model": "teacher", "key_env": "TEACHER_KEY"}
            raw["evaluate"]["judge"] = {"api": api}
        run(raw)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "answers.sqlite", "report.html"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_failed_requests_are_sent_again_by_the_same_command(tmp_path: Path) -> None:
    failing = [True]

    def script(number: int, payload: dict[str, Any]) -> Reply:
        if failing[0] and number == 7:
            return Reply(body=b"no chat completion")
        return Reply(text=json.dumps(toys.truth(payload["messages"][-1]["content"])))

    with Stub(script) as stub:
        raw = toys.recipe(tmp_path, "extract", **toys.api(tmp_path, stub.url))
        first = next(stage for stage in run(raw).stages if stage.name == "answers")
        failing[0] = False
        second = next(stage for stage in run(raw).stages if stage.name == "answers")
        assert (first.summary["answered"], second.summary["answered"]) == (19, 20)
        assert all(stage.reused for stage in run(raw).stages)
        assert len(stub.payloads) == 21


def test_spending_without_a_budget_needs_confirmation(tmp_path: Path) -> None:
    raw = toys.recipe(tmp_path, "extract", **toys.api(tmp_path, "http://127.0.0.1:9/v1"))
    raw["teacher"]["api"] |= {"price": {"input": 1.0, "output": 2.0}}
    recipe = parse_recipe(toys.clean(raw))
    asked: list[str] = []

    def decline(question: str) -> bool:
        asked.append(question)
        return False

    with pytest.raises(RecipeError, match="0 of 20 requests are answered; the rest takes at most"):
        agree_to_spend(recipe, base=tmp_path)
    assert not agree_to_spend(recipe, base=tmp_path, confirm=decline)
    assert asked[0].endswith("There is no budget. Send the requests?")
    assert "0 of 20 requests are answered; the rest takes at most" in asked[0]
    raw["teacher"]["budget"] = {"max_usd": 1.0}
    assert agree_to_spend(parse_recipe(toys.clean(raw)), base=tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"task": {"json_schema": "nowhere.json"}}, DataError, "cannot be read"),
        ({"task": {"prompt": "nothing"}}, RecipeError, "has no {text}"),
        ({"evaluate": {"scorer": "score"}}, RecipeError, "path.py:function"),
        ({"evaluate": {"judge": {"model": "x"}}}, RecipeError, "kind: generate"),
        (
            {"teacher": {"model": None, "api": {"base_url": "http://x/v1", "model": "x"}}},
            RecipeError,
            "needs a model to start from",
        ),
        ({"student": {"vocabulary": "data"}}, RecipeError, "student.vocabulary"),
    ],
    ids=["schema", "prompt", "scorer", "judge", "an api's student", "vocabulary"],
)
def test_an_invalid_recipe_is_a_clear_error(
    tmp_path: Path, changes: dict[str, Any], error: type[StillhouseError], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(toys.recipe(tmp_path, "extract", **changes))


def test_a_reference_answer_that_does_not_match_the_schema_is_an_error(tmp_path: Path) -> None:
    gold = [{"path": str(tmp_path / "texts.jsonl"), "label": "gold"}]
    raw = toys.recipe(tmp_path, "extract", data={"texts": gold})
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": "Gus is 9.", "gold": {"name": "Gus"}}\n')
    with pytest.raises(DataError, match="does not match the schema") as caught:
        run(raw)
    assert caught.value.where is not None
    assert caught.value.where.endswith("texts.jsonl:21")


def test_the_shape_of_a_tasks_student_is_searched(tmp_path: Path) -> None:
    raw = toys.recipe(tmp_path, "generate")
    search = {"tolerance": 0.2, "candidates": 2, "trained": 0}
    target = {"target": {"params": "80%"}, "search": search}
    raw["student"] = {"start": "pruned", "calibration_tokens": 64, **target}
    result = run(raw)
    names = [stage.name for stage in result.stages]
    assert names[3:5] == ["search", "student"]
    teacher, student = (result.evaluation.of(role).figures for role in ("teacher", "student"))
    assert student["parameters"] <= 0.8 * teacher["parameters"]


def test_the_student_of_a_task_can_be_trained_on_policy(tmp_path: Path) -> None:
    raw = toys.recipe(tmp_path, "generate")
    raw["train"]["on_policy"] = {"share": 0.5, "max_tokens": 6}
    result = run(raw)
    rows = read_metrics(result.stage("train").path / METRICS)
    assert sum(row["own_tokens"] for row in rows if "loss" in row) > 0
    assert any("own_reverse_kl" in row for row in rows)


def test_on_policy_distillation_needs_a_local_teacher(tmp_path: Path) -> None:
    with Stub(extraction) as stub:
        raw = toys.recipe(tmp_path, "extract", **toys.api(tmp_path, stub.url))
        raw["train"]["on_policy"] = {}
        with pytest.raises(RecipeError, match="on_policy needs a local teacher"):
            parse_recipe(toys.clean(raw))
