"""Complete classify runs with tiny models, for each kind of student and of teacher."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from stillhouse.check import check_recipe
from stillhouse.classify import label_judgment as judge_module
from stillhouse.classify.classifier import load_classifier
from stillhouse.classify.classifier_students import build_classifier
from stillhouse.classify.classify_job import find_task
from stillhouse.classify.label_judgment import Judgment
from stillhouse.classify.label_scoring import label_scores
from stillhouse.classify.task_texts import Texts, prepare_texts
from stillhouse.cli import app
from stillhouse.commands import find_predictor
from stillhouse.commands import run as run_task
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import DataError, ModelError, RecipeError, RunError, StillhouseError
from stillhouse.export import onnx_export as onnx
from stillhouse.generation.journal import Journal
from stillhouse.runfolder import answers_path
from tests import tiny
from tests.classify import toys
from tests.generation.stub import Reply, Stub, error

pytestmark = pytest.mark.run

KEY = "sk-very-secret-1234567890"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


def run(raw: dict[str, Any]) -> Any:
    return run_task(parse_recipe(raw))


@pytest.mark.usefixtures("charts")
def test_a_run_has_every_product_and_a_rerun_reuses_every_stage(folder: Path) -> None:
    raw = toys.recipe(folder, data=toys.with_gold(folder))
    result = run(raw)
    roles = [one.role for one in result.evaluation.results]
    assert roles == ["teacher", "untrained", "student", "fine_tuned"]
    assert all(one.accuracy is not None for one in result.evaluation.results)
    assert "<path" in result.report.read_text()
    card = (result.model / "README.md").read_text()
    assert "text-classification" in card
    digest = hashlib.sha256((result.model / "model.safetensors").read_bytes()).hexdigest()
    assert f"| model.safetensors | {digest} |" in card
    for part in ("## License", "## Limits", "| teacher |", "training texts", "Loaded by a process"):
        assert part in card
    assert all(stage.reused for stage in run(raw).stages)


def test_reference_labels_of_some_texts_are_used_for_metrics_and_the_baseline(
    tmp_path: Path,
) -> None:
    """Every fifth label in the first file is empty, and the second file has no labels."""
    rows = [f"{word} number {n},{label if n % 5 else ''}" for n, word, label in toys.rows(40)]
    more = [f"more {word} number {n}" for n, word, _ in toys.rows(20)]
    (tmp_path / "some.csv").write_text("\n".join(["text,label", *rows]))
    (tmp_path / "none.txt").write_text("\n".join(more))
    files = [
        {"path": str(tmp_path / "some.csv"), **toys.GOLD},
        {"path": str(tmp_path / "none.txt")},
    ]
    raw = toys.recipe(tmp_path, data={"texts": files})
    raw["evaluate"] |= {"abstain": {"measure": "accuracy", "target": 0.5}}
    result = run(raw)
    texts = next(Texts.load(stage.path) for stage in result.stages if stage.name == "texts")
    known = [row for row in texts.all if row.gold is not None]
    assert len(known) == 32
    tuned = next(stage for stage in result.stages if stage.name == "baseline")
    assert tuned.summary["texts"] == sum(row.gold is not None for row in texts.train)
    student = result.evaluation.of("student")
    measured = sum(row.gold is not None for row in texts.test)
    assert sum(map(sum, student.confusion)) == measured < len(texts.test)
    assert 0 <= student.accuracy <= 1
    said = " ".join(result.evaluation.notes)
    assert f"{measured} of {len(texts.test)} test texts have reference labels" in said
    assert f"of {len(texts.train)} training texts" in said


def test_the_banking_recipe_runs_on_a_file_like_its_own(tmp_path: Path) -> None:
    """The file is sorted by label like the real one, with the labels of the recipe's examples."""
    path = Path(__file__).parents[2] / "recipes" / "banking77.yaml"
    teacher = tiny.save_model(tmp_path / "teacher", max_position_embeddings=4096)
    raw = yaml.safe_load(path.read_text())
    labels = sorted({example["label"] for example in raw["task"]["examples"]})
    rows = [f"question {number} about {label},{label}" for label in labels for number in range(6)]
    (tmp_path / "bank.csv").write_text("\n".join(["text,category", *rows]))
    changes = {
        "data.texts.0.path": tmp_path / "bank.csv",
        "teacher.model": teacher,
        "student.layers": 1,
        "train.epochs": 1,
        "folder": tmp_path / "run",
    }
    result = run_task(path, overrides=[f"{key}={value}" for key, value in changes.items()])
    assert result.evaluation.labels == labels
    roles = [one.role for one in result.evaluation.results]
    assert roles == ["teacher", "untrained", "student", "fine_tuned"]


def test_another_prior_does_not_query_the_teacher_again(folder: Path) -> None:
    raw = toys.recipe(folder, data=toys.with_gold(folder))
    run(raw)
    raw["task"] = {**raw["task"], "prior": "content_free"}
    reused = {stage.name: stage.reused for stage in run(raw).stages}
    assert reused["judgment"]
    assert not reused["train"]


@pytest.mark.parametrize(
    "student",
    [
        {"start": "truncated", "layers": 1},
        {"start": "truncated", "layers": 1, "pooling": "last"},
        {"start": "pretrained", "model": "other", "head": "words"},
        {"start": "pretrained", "model": "other", "head": "classes"},
    ],
    ids=["truncated", "last token", "words", "classes"],
)
def test_every_kind_of_student_learns(tmp_path: Path, student: dict[str, Any]) -> None:
    raw = toys.recipe(tmp_path, student=student)
    raw["train"] |= {"epochs": 6, "learning_rate": 3e-3}
    if "model" in student:
        student["model"] = str(tiny.save_model(tmp_path / "other", seed=1))
    result = run(raw)
    untrained, trained = (result.evaluation.of(role) for role in ("untrained", "student"))
    assert trained.kl < untrained.kl
    rows = list(find_predictor(result.folder)(["cat number 3", "soup"]))
    assert [row["text"] for row in rows] == ["cat number 3", "soup"]
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["confidence"] == max(row["probabilities"].values())


def test_the_teacher_as_a_student_predicts_what_the_teacher_predicts(tmp_path: Path) -> None:
    raw = toys.recipe(tmp_path)
    model = str(tmp_path / "teacher")
    raw["student"] = {"start": "pretrained", "model": model, "head": "words"}
    untrained = run(raw).evaluation.of("untrained")
    assert untrained.agreement == 1.0
    assert untrained.kl == pytest.approx(0.0, abs=1e-5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts in each call that scores labels, in chunks of 8; the third call is
    interrupted."""
    monkeypatch.setattr(judge_module, "CHUNK", 8)
    found: list[int] = []

    def counted(model: Any, prompts: Any, labels: Any, *more: Any) -> Any:
        found.append(len(prompts))
        if len(found) == 3:
            raise KeyboardInterrupt
        return label_scores(model, prompts, labels, *more)

    monkeypatch.setattr(judge_module, "label_scores", counted)
    return found


def test_interrupted_scoring_resumes_where_it_stopped(tmp_path: Path, calls: list[int]) -> None:
    raw = toys.recipe(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(raw)
    run(raw)
    # There are 40 texts, and 3 without content, in chunks of 8. Two chunks were kept, and four were
    # missing. Then the teacher's speed is measured on 4 texts: a warm-up and two measurements.
    assert calls == [8, 8, 8, 8, 8, 8, 3, 4, 4, 4]


def test_damaged_scores_of_an_interrupted_run_are_not_used(
    tmp_path: Path, calls: list[int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(toys.recipe(tmp_path))
    first, second = sorted(tmp_path.rglob("*.scores"))
    flipped = bytearray(first.read_bytes())
    flipped[-1] ^= 1
    first.write_bytes(flipped)
    second.write_bytes(second.read_bytes()[:-4])
    calls.append(0)  # separates the two runs
    run(toys.recipe(tmp_path))
    assert calls[4:10] == [8, 8, 8, 8, 8, 3]


def test_predict_reads_lines_and_objects(folder: Path) -> None:
    run(toys.recipe(folder, data=toys.with_gold(folder)))
    answer = CliRunner().invoke(
        app, ["predict", str(folder / "run")], input='a cat\n{"text": "the soup"}\n'
    )
    assert answer.exit_code == 0
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["a cat", "the soup"]
    assert set(rows[0]) == {"text", "label", "confidence", "abstain", "probabilities"}


def test_check_and_preview_read_a_classify_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toys.recipe(tmp_path)))
    found = {(one.level, one.topic): one.text for one in check_recipe(path)}
    assert found[("ok", "texts")].startswith("27 to learn from, 5 for the threshold, 8 to")
    assert "pairs of text and label" in found[("estimate", "judgment")]
    assert "no reference labels" in found[("warning", "texts")]
    shown = CliRunner().invoke(app, ["preview", str(path), "--rows", "1"])
    assert shown.exit_code == 0
    assert "What is the topic" in shown.stdout
    assert "pets | food" in shown.stdout


def test_the_card_and_check_report_the_licenses_of_all_models(tmp_path: Path) -> None:
    raw = toys.recipe(tmp_path, student={"start": "truncated", "layers": 1, "model": "other"})
    tiny.save_model(tmp_path / "other", seed=1)
    (tmp_path / "other" / "README.md").write_text("---\nlicense: gemma\n---\n")
    raw["student"]["model"] = str(tmp_path / "other")
    raw["teacher"]["license"] = "llama3.2"
    card = (run(raw).model / "README.md").read_text()
    assert "The teacher's: **llama3.2**. Warning: " in card
    assert f"The student's start, {tmp_path / 'other'}: **gemma**. Warning: " in card
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    warned = [one.text for one in check_recipe(path) if one.topic == "license"]
    assert [text.split(",")[0] for text in warned] == ["The teacher", "The student's start"]


def test_check_reports_the_maximum_cost_of_an_api(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(api_recipe(tmp_path, "http://127.0.0.1:9/v1")))
    found = {(one.level, one.topic): one.text for one in check_recipe(path)}
    assert "0 of 40 requests are answered" in found[("estimate", "judgment")]


def test_calls_made_by_check_are_not_repeated_by_the_run(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(text=said_label(payload), usage=(20, 1 + number % 2))

    path = tmp_path / "recipe.yaml"
    with Stub(script) as stub:
        raw = api_recipe(tmp_path, stub.url)
        path.write_text(yaml.safe_dump(raw))
        before = {one.topic: one for one in check_recipe(path)}
        assert "--calls 5" in str(before["judgment"].fix)
        found = {one.topic: one for one in check_recipe(path, calls=4)}
        assert len(stub.payloads) == 4
        said = "4 of 40 requests are answered; the rest takes about 774 tokens"
        assert found["judgment"].text.startswith(said)
        assert "95% likely" in found["judgment"].text
        run(raw)
        assert len(stub.payloads) == 40


def test_check_reports_that_a_run_is_sending_requests(tmp_path: Path) -> None:
    raw = api_recipe(tmp_path, "http://127.0.0.1:9/v1")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    with Journal(answers_path(parse_recipe(raw))):
        found = [(one.level, one.text) for one in check_recipe(path, calls=3)]
    assert not [text for level, text in found if level == "error"]
    assert any(level == "warning" and "a run has the journal open" in text for level, text in found)


# --- a teacher behind an API ---------------------------------------------------------------------


def api_recipe(folder: Path, url: str, **more: Any) -> dict[str, Any]:
    teacher = {"api": {"base_url": url, "model": "teacher"}, **more}
    tokenizer = str(folder / "teacher")
    raw = toys.recipe(folder, teacher=teacher, data=toys.with_gold(folder))
    raw["student"] |= {"tokenizer": tokenizer, "teacher_embeddings": False}
    return raw


def said_label(payload: dict[str, Any]) -> str:
    text = payload["messages"][-1]["content"]
    return "pets" if any(word in text for word in toys.WORDS["pets"]) else "food"


def number_of(payload: dict[str, Any]) -> int:
    found = re.search(r"number (\d+)", payload["messages"][-1]["content"])
    assert found is not None
    return int(found[1])


def test_an_api_is_queried_once_and_its_labels_are_learned(tmp_path: Path) -> None:
    with Stub(lambda number, payload: Reply(text=f' "{said_label(payload).title()}".')) as stub:
        raw = api_recipe(tmp_path, stub.url)
        result = run(raw)
        asked = len(stub.payloads)
        raw["task"] = {**raw["task"], "prior": "none"}
        raw["folder"] = str(tmp_path / "other")
        run(raw)
        assert (asked, len(stub.payloads)) == (40, 40)
    assert "exactly one of these" in stub.payloads[0]["messages"][0]["content"]
    assert result.evaluation.of("teacher").accuracy == 1.0
    assert "40 labels" in result.evaluation.notes[0]


def test_no_file_of_a_run_contains_the_api_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if the server repeats it in an answer and in an error message."""
    monkeypatch.setenv("TEACHER_KEY", KEY)

    def script(number: int, payload: dict[str, Any]) -> Reply:
        if number == 0:
            return error(400, f"you sent {KEY}")
        return Reply(text=KEY if number == 1 else said_label(payload))

    with Stub(script, key=KEY) as stub:
        raw = api_recipe(tmp_path, stub.url)
        raw["teacher"]["api"]["key_env"] = "TEACHER_KEY"
        run(raw)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "answers.sqlite", "report.html"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_answers_that_are_not_labels_are_counted_and_left_out(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(text="no idea" if number_of(payload) % 4 == 2 else said_label(payload))

    with Stub(script) as stub:
        result = run(api_recipe(tmp_path, stub.url))
    assert "10 answers were not a label" in result.evaluation.notes[0]
    stage = next(stage for stage in result.stages if stage.name == "judgment")
    judged = Judgment.load(stage.path)
    rows = torch.cat([judged.train, judged.calibration, judged.test])
    assert int(rows.isnan().any(-1).sum()) == 10


def test_a_budget_stops_the_judgment_and_answers_are_kept(tmp_path: Path) -> None:
    with Stub(lambda number, payload: Reply(text=said_label(payload))) as stub:
        raw = api_recipe(tmp_path, stub.url, budget={"max_tokens": 400})
        with pytest.raises(RunError, match="budget is used up"):
            run(raw)
        paid = len(stub.payloads)
        assert 0 < paid < 40
        raw["teacher"]["budget"] = {}
        run(raw)
        assert len(stub.payloads) == 40


def test_failed_requests_are_sent_again_by_the_same_command(tmp_path: Path) -> None:
    failing = {3, 8}

    def script(number: int, payload: dict[str, Any]) -> Reply:
        if number_of(payload) in failing:
            return Reply(body=b"no chat completion")
        if number_of(payload) == 5:
            return Reply(status=400, body=b"refused")
        return Reply(text=said_label(payload))

    with Stub(script) as stub:
        raw = api_recipe(tmp_path, stub.url)
        assert "3 requests had no answer" in run(raw).evaluation.notes[0]
        failing.clear()
        assert "1 requests had no answer" in run(raw).evaluation.notes[0]
        asked = len(stub.payloads)
        # A request that was refused is not sent again.
        assert all(stage.reused for stage in run(raw).stages)
        assert len(stub.payloads) == asked == 43


def test_a_part_with_too_few_labels_from_the_teacher_is_an_error(tmp_path: Path) -> None:
    """A first run, whose teacher answers everything, shows which texts are in which part."""
    with Stub(lambda number, payload: Reply(text=said_label(payload))) as stub:
        raw = api_recipe(tmp_path, stub.url)
        stage = next(stage for stage in run(raw).stages if stage.name == "texts")
    silent = [row.text for row in Texts.load(stage.path).calibration]

    def script(number: int, payload: dict[str, Any]) -> Reply:
        asked = payload["messages"][-1]["content"]
        known = not any(f"{text}\n" in asked for text in silent[:3])
        return Reply(text=said_label(payload) if known else "no idea")

    with Stub(script) as stub:
        raw = api_recipe(tmp_path, stub.url)
        raw["folder"] = str(tmp_path / "other" / "run")
        with pytest.raises(DataError, match="2 texts of the calibration part"):
            run(raw)


def test_top_logprobs_become_a_distribution(tmp_path: Path) -> None:
    top = [
        {"token": "Pe", "logprob": math.log(0.6)},
        {"token": "food", "logprob": math.log(0.2)},
        {"token": "x", "logprob": math.log(0.1)},
    ]
    logprobs = [{"token": "Pe", "logprob": math.log(0.6), "top_logprobs": top}]
    with Stub(lambda number, payload: Reply(text="pets", logprobs=logprobs)) as stub:
        recipe = toys.parsed(api_recipe(tmp_path, stub.url, top_logprobs=3))
        result = run_task(recipe)
    stage = next(stage for stage in result.stages if stage.name == "judgment")
    shares = Judgment.load(stage.path).distribution("train", recipe)[0]
    torch.testing.assert_close(shares, torch.tensor([0.75, 0.25]))


def test_a_reasoning_api_is_sampled_as_configured_and_read_after_its_reasoning(
    tmp_path: Path,
) -> None:
    """Its reasoning names every label; `extra` can constrain the answer."""

    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(text=f"<think>pets or food?</think>\n{said_label(payload)}")

    extra = {"guided_choice": ["pets", "food"]}
    sampling = {"temperature": None, "max_tokens": 900, "extra": extra}
    with Stub(script) as stub:
        result = run(api_recipe(tmp_path, stub.url, sampling=sampling))
        sent = stub.payloads[0]
    assert result.evaluation.of("teacher").accuracy == 1.0
    assert "40 labels" in result.evaluation.notes[0]
    assert (sent["max_tokens"], sent["guided_choice"]) == (900, ["pets", "food"])
    assert "temperature" not in sent


def test_reasoning_that_is_cut_off_needs_a_higher_limit(tmp_path: Path) -> None:
    reply = Reply(text="<think>pets or food?", finish_reason="length")
    with (
        Stub(lambda number, payload: reply) as stub,
        pytest.raises(DataError, match="are not, and 0 requests") as error,
    ):
        run(api_recipe(tmp_path, stub.url))
    assert str(error.value.fix).startswith("raise teacher.sampling.max_tokens, which cut off 40")


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ({}, (0.0, 32)),
        ({"samples": 3}, (1.0, 32)),
        ({"samples": 3, "sampling": {"max_tokens": 99}}, (1.0, 99)),
        ({"samples": 3, "sampling": {"temperature": 0.5}}, (0.5, 32)),
    ],
)
def test_the_default_temperature_depends_on_the_number_of_samples(
    tmp_path: Path, teacher: dict[str, Any], expected: tuple[float, int]
) -> None:
    sampling = parse_recipe(api_recipe(tmp_path, "http://x/v1", **teacher)).teacher.sampling
    assert (sampling.temperature, sampling.max_tokens) == expected


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"samples": 3, "sampling": {"temperature": 0.0}}, "all samples are identical"),
        ({"sampling": {"top_logprobs": 3}}, "set teacher.top_logprobs"),
        ({"api": None, "model": "m", "sampling": {"max_tokens": 9}}, "sampling is only for an API"),
    ],
)
def test_invalid_sampling_is_rejected(tmp_path: Path, teacher: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(api_recipe(tmp_path, "http://x/v1", **teacher))


# --- user errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"task": {"kind": "classify"}}, RecipeError, "no labels"),
        ({"task": {"kind": "classify", "labels": ["pets", "toys"]}}, DataError, "'food' is not in"),
        ({"data": {"texts": [{"path": "nowhere.csv"}]}}, DataError, "does not exist"),
        ({"student": {"start": "truncated", "layers": 99}}, RecipeError, "has 3 layers"),
    ],
    ids=["no labels", "unknown label", "no file", "too many layers"],
)
def test_an_invalid_recipe_is_a_clear_error(
    tmp_path: Path, changes: dict[str, Any], kind: type[StillhouseError], said: str
) -> None:
    raw = toys.recipe(tmp_path, data=toys.with_gold(tmp_path))
    if changes.get("task") == {"kind": "classify"}:
        raw["data"] = {"texts": [{"path": str(tmp_path / "texts.jsonl")}]}
    with pytest.raises(kind, match=said) as caught:
        run({**raw, **changes})
    assert caught.value.fix


def test_a_teacher_without_a_chat_template_needs_plain_prompts(tmp_path: Path) -> None:
    raw = toys.recipe(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="no chat template"):
        run(raw)
    raw["task"] = {**raw["task"], "chat": False}
    assert run(raw).evaluation.texts == 8


@pytest.mark.parametrize(
    ("row", "said"),
    [('{"text": ""}', "text is empty"), ('{"txt": "a"}', "no text under"), ("[1]", "not an obj")],
)
def test_the_error_for_an_invalid_row_names_its_line(tmp_path: Path, row: str, said: str) -> None:
    raw = toys.recipe(tmp_path)
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError, match=said) as caught:
        run(raw)
    assert caught.value.where is not None
    assert caught.value.where.endswith("texts.jsonl:41")


def test_a_classifier_is_exported_to_onnx_and_reported(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    raw = toys.recipe(tmp_path, export={"formats": ["safetensors", "onnx", "onnx-int8"]})
    result = run(raw)
    session = onnxruntime.InferenceSession(result.folder / "onnx" / "model.onnx")
    classifier = load_classifier(result.model)
    ids = np.array(classifier.tokens(["bird number 7"]))
    [logits] = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    expected = classifier.probabilities(["bird number 7"])
    assert torch.allclose(torch.from_numpy(logits).softmax(-1), expected, atol=1e-5)
    assert (result.folder / "onnx-int8" / "tokenizer.json").is_file()
    assert (result.folder / "onnx" / "classifier.json").is_file()
    assert not (result.folder / "onnx" / "model.safetensors").exists()
    card = (result.folder / "onnx-int8" / "README.md").read_text()
    assert "library_name: onnx" in card
    assert "for onnxruntime" in card
    assert "their inputs dynamically" in card
    assert re.search(r"In onnxruntime this file \(onnx-int8, .* nats/text", card)
    assert "| model.onnx | " in card
    assert "their inputs dynamically" not in (result.folder / "onnx" / "README.md").read_text()
    page = result.report.read_text()
    assert "onnx-int8" in page
    assert "Relative to the checkpoint" in page


@pytest.mark.parametrize(
    "student",
    [
        {"start": "random", "hidden_size": 16, "layers": 2, "heads": 2},
        {"start": "truncated", "layers": 1},
        {"start": "pretrained", "model": "teacher"},
    ],
)
def test_a_student_too_large_for_an_onnx_file_is_rejected_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: dict[str, Any]
) -> None:
    """`check` predicts the parameters of the student that is built, and counts each one once."""
    monkeypatch.setattr(onnx, "MODULES", ())
    if "model" in student:
        student = {**student, "model": str(tmp_path / "teacher")}
    raw = toys.recipe(tmp_path, student=student, export={"formats": ["onnx"]})
    job = find_task(toys.parsed(raw), tmp_path)
    texts = prepare_texts(job.recipe, tmp_path)
    made = build_classifier(
        job.recipe.student,
        job.student,
        job.teacher,
        job.prompt(texts),
        ["a cat"],
        max_tokens=32,
        seed=0,
        out=tmp_path / "made",
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(onnx, "LARGEST", 4 * made["parameters"])
    assert check_recipe(path)[-1].level == "ok"
    monkeypatch.setattr(onnx, "LARGEST", 4 * made["parameters"] - 1)
    last = check_recipe(path)[-1]
    assert last.level == "error"
    assert f"{made['parameters']:,} parameters in float32 exceed" in last.text


def test_a_language_model_that_scores_words_cannot_be_exported_to_onnx(tmp_path: Path) -> None:
    student = {"start": "pretrained", "model": str(tmp_path / "teacher"), "head": "words"}
    raw = toys.recipe(tmp_path, student=student, export={"formats": ["onnx"]})
    with pytest.raises(RecipeError, match="cannot be exported as an ONNX classifier"):
        run(raw)
