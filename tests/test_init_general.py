"""General chats that the teacher writes in addition to the user's text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from stillhouse.check import check_recipe
from stillhouse.cli import app
from stillhouse.config.load_recipe import load_recipe
from stillhouse.init_general import (
    CHAT_TOKENS,
    MOST_PROMPTS,
    SHARE,
    TEMPLATES,
    TOPICS,
    answers_briefly,
    chats_beside,
    general_chats,
)
from tests import tiny


def test_a_short_text_is_used_whole_with_a_third_as_many_tokens_of_chats() -> None:
    beside = chats_beside(9000)
    assert beside == 3000
    found = general_chats([6000, 3000], used=12_000)
    assert found.own == [None, None]
    assert found.prompts == round(3000 / CHAT_TOKENS)


def test_sources_of_a_long_text_are_used_in_proportion() -> None:
    found = general_chats([300_000, 100_000], used=20_000)
    assert found.own == [11_250, 3_750]
    assert found.prompts == round(SHARE * 20_000 / CHAT_TOKENS)


def test_the_number_of_prompts_is_limited() -> None:
    assert len(set(TEMPLATES)) * len(set(TOPICS)) == MOST_PROMPTS
    most = MOST_PROMPTS * CHAT_TOKENS
    assert chats_beside(1e7) == most
    found = general_chats([1e7], used=1e6)
    assert (found.prompts, found.own) == (MOST_PROMPTS, [1_000_000 - most])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "teacher", max_position_embeddings=1024)
    tiny.save_model(tmp_path / "small", seed=1, hidden_size=16, intermediate_size=32)
    chats = [
        [
            {"role": "user", "content": f"What is {n} plus {n}?"},
            {"role": "assistant", "content": f"{n} plus {n} is {2 * n}, which is even."},
        ]
        for n in range(900)
    ]
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "chats.jsonl").write_text(rows)
    return tmp_path


def init(folder: Path, size: str) -> str:
    flags = ["--job", "distill", "--teacher", str(folder / "teacher"), "--size", size]
    data = ["--data", str(folder / "chats.jsonl"), "--out", str(folder / "mine.yaml")]
    answer = CliRunner().invoke(app, ["init", *flags, *data])
    assert answer.exit_code == 0, answer.output + repr(answer.exception)
    return " ".join(answer.output.split())


@pytest.mark.run
def test_a_recipe_lets_the_teacher_answer_general_questions(folder: Path) -> None:
    shown = init(folder, "large")
    recipe = load_recipe(folder / "mine.yaml")
    assert recipe.synthesize is not None
    assert recipe.data.sources[-1].path == recipe.synthesize.out == "mine-general.jsonl"
    assert f"{recipe.synthesize.prompts.limit} general questions" in shown
    found = {one.topic: one for one in check_recipe(folder / "mine.yaml")}
    assert "error" not in {one.level for one in found.values()}
    assert "training" in found  # estimated before the teacher has answered


@pytest.mark.run
def test_a_student_of_another_model_learns_only_from_the_users_text(folder: Path) -> None:
    shown = init(folder, str(folder / "small"))
    recipe = load_recipe(folder / "mine.yaml")
    assert recipe.synthesize is None
    assert len(recipe.data.sources) == 1
    assert "add chats about them" in shown


@pytest.mark.parametrize(
    ("template", "brief"),
    [
        ("{{ messages[0].content }}", True),
        ("{{ messages[0].content }}<think>", False),
        ("<|channel|>analysis<|message|>", False),
        (None, False),
    ],
)
def test_teachers_that_reason_first_write_no_chats(template: str | None, brief: bool) -> None:
    assert answers_briefly(SimpleNamespace(chat_template=template)) is brief


@pytest.mark.run
def test_a_teacher_without_a_chat_template_writes_no_chats(folder: Path) -> None:
    (folder / "teacher" / "chat_template.jinja").unlink(missing_ok=True)
    settings = folder / "teacher" / "tokenizer_config.json"
    raw = json.loads(settings.read_text())
    raw.pop("chat_template", None)
    settings.write_text(json.dumps(raw))
    init(folder, "large")
    assert load_recipe(folder / "mine.yaml").synthesize is None
