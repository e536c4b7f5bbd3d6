"""Before anything is generated, chat templates are rendered with the messages of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.check import check_recipe
from stillhouse.commands import run, synthesize_text
from stillhouse.errors import ModelError
from tests import tiny

pytestmark = pytest.mark.run

REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + tiny.CHAT_TEMPLATE
)
"""Like Gemma 2's template and Mistral's first ones."""
IGNORES_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALTERNATES = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + tiny.CHAT_TEMPLATE
)
ONE_TURN = (
    "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
    + tiny.CHAT_TEMPLATE
)


def recipe(folder: Path, template: str, **prompts: Any) -> dict[str, Any]:
    raw = tiny.recipe(folder)
    words = tiny.tokenizer()
    words.chat_template = template
    words.save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("".join(f"Say {n}\n" for n in range(40)))
    raw["synthesize"] = {
        "teacher": {"local": {}},
        "prompts": {"path": str(folder / "prompts.txt"), **prompts},
        "sampling": {"max_tokens": 4},
        "filters": {"truncated": False},
        "out": str(folder / "out.jsonl"),
    }
    source = {"kind": "jsonl", "path": str(folder / "out.jsonl")}
    raw["data"] = {"sources": [source], "heldout_tokens": 64}
    raw["evaluate"]["prompts"] = []
    return raw


def error_of(raw: dict[str, Any]) -> tuple[str, str]:
    last = check_recipe(raw)[-1]
    assert last.level == "error"
    return last.text, last.fix or ""


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, IGNORES_SYSTEM, ALTERNATES])
def test_check_reports_that_the_template_rejects_system_prompts(
    tmp_path: Path, template: str
) -> None:
    text, fix = error_of(recipe(tmp_path, template, system="Be brief."))
    assert "does not accept a system prompt" in text
    assert "remove synthesize.prompts.system, or move its text to the prompt" in fix


def test_run_rejects_the_template_before_any_request(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="System role not supported"):
        run(recipe(tmp_path, REFUSES_SYSTEM, system="Be brief."))
    assert not (tmp_path / "answers.sqlite").exists()
    assert not [*(tmp_path / "run" / "stages").iterdir()]


def test_synthesize_rejects_the_template_before_any_request(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tmp_path, REFUSES_SYSTEM, system="Be brief.")))
    with pytest.raises(ModelError, match="System role not supported"):
        synthesize_text(file)
    assert not (tmp_path / "answers.sqlite").exists()


def test_without_the_system_prompt_check_and_run_succeed(tmp_path: Path) -> None:
    raw = recipe(tmp_path, REFUSES_SYSTEM)
    assert "error" not in {one.level for one in check_recipe(raw)}
    assert run(raw) is not None


def test_check_finds_a_system_message_in_a_single_prompt(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"Say {n}"}]} for n in range(30)]
    chats[20]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats))
    text, fix = error_of(recipe(tmp_path, REFUSES_SYSTEM, path=str(file)))
    assert "does not accept a system prompt" in text
    assert "remove the system messages from the prompts" in fix


def test_check_renders_few_shot_examples(tmp_path: Path) -> None:
    examples = [{"prompt": "Say 1", "answer": "1"}]
    text, fix = error_of(recipe(tmp_path, ONE_TURN, examples=examples))
    assert "does not accept the examples: one turn only" in text
    assert "remove synthesize.prompts.examples" in fix


def test_check_renders_the_students_template_with_the_same_messages(tmp_path: Path) -> None:
    raw = recipe(tmp_path, tiny.CHAT_TEMPLATE, system="Be brief.")
    student = tiny.save_model(tmp_path / "student")
    words = tiny.tokenizer()
    words.chat_template = REFUSES_SYSTEM
    words.save_pretrained(student)
    raw["student"] = {"start": "pretrained", "model": str(student)}
    text, _ = error_of(raw)
    assert "the student's chat template does not accept a system prompt" in text


def test_check_renders_the_prompts_of_the_evaluation(tmp_path: Path) -> None:
    needs_system = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}"
        "{% endif %}" + tiny.CHAT_TEMPLATE
    )
    raw = tiny.recipe(tmp_path)
    words = tiny.tokenizer()
    words.chat_template = needs_system
    words.save_pretrained(tmp_path / "teacher")
    text, _ = error_of(raw)
    assert "no system message" in text
    assert "evaluate.prompts" in text
