"""Problems of a task that `check` reports also stop `run` before its first request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from stillhouse.check import check_recipe
from stillhouse.commands import run
from stillhouse.errors import StillhouseError
from tests import tiny
from tests.answering import toys as answering
from tests.classify import toys as classify

pytestmark = pytest.mark.run

REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + tiny.CHAT_TEMPLATE
)


def retemplated(folder: Path, template: str) -> None:
    words = tiny.tokenizer()
    words.chat_template = template
    words.save_pretrained(folder)


def error_of_check_and_run(raw: dict[str, Any], folder: Path) -> str:
    """The first error of `check`. Asserts that `run` fails too, before any stage or request."""
    found = [one for one in check_recipe(answering.clean(raw)) if one.level == "error"]
    assert found
    with pytest.raises(StillhouseError):
        run(answering.clean(raw))
    stages = folder / "run" / "stages"
    assert not stages.exists() or not [*stages.iterdir()]
    assert not (folder / "answers.sqlite").exists()
    return f"{found[0].text}; {found[0].fix}"


def test_an_answering_teacher_that_rejects_system_prompts_is_an_error(tmp_path: Path) -> None:
    raw = answering.recipe(tmp_path, "generate", task={"system": "Be brief."})
    retemplated(tmp_path / "teacher", REFUSES_SYSTEM)
    text = error_of_check_and_run(raw, tmp_path)
    assert "remove task.system, or move its text to the prompt" in text


def test_an_answering_student_that_rejects_system_prompts_is_an_error(tmp_path: Path) -> None:
    raw = answering.recipe(tmp_path, "generate", task={"system": "Be brief."})
    retemplated(tmp_path / "small", REFUSES_SYSTEM)
    student = {"start": "pretrained", "model": str(tmp_path / "small")}
    raw["student"] = student
    assert "the student's chat template does not accept a system prompt" in error_of_check_and_run(
        raw, tmp_path
    )


def test_a_classifiers_teacher_that_rejects_system_prompts_is_an_error(tmp_path: Path) -> None:
    raw = classify.recipe(tmp_path)
    raw["task"]["system"] = "You sort messages."
    retemplated(tmp_path / "teacher", REFUSES_SYSTEM)
    assert "remove task.system" in error_of_check_and_run(raw, tmp_path)


def save_gpt2(folder: Path) -> Path:
    """A GPT-2 with 64 positions."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny.tokenizer()), n_positions=64, n_embd=32, n_layer=1, n_head=2,
        eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_prompts_beyond_the_positions_of_a_classifiers_teacher_are_an_error(tmp_path: Path) -> None:
    raw = classify.recipe(tmp_path)
    save_gpt2(tmp_path / "teacher")
    assert "the teacher 64 positions" in error_of_check_and_run(raw, tmp_path)


@pytest.mark.parametrize(
    ("student", "what"),
    [
        ({"start": "truncated", "layers": 9}, "the model has 3 layers, but student.layers is 9"),
        ({"start": "truncated", "layers": 1, "model": "gpt2"}, "has no list of layers to cut"),
        ({"start": "pretrained", "model": "gpt2", "head": "words"}, "the student 64 positions"),
    ],
)
def test_a_classifier_that_cannot_be_built_is_an_error(
    tmp_path: Path, student: dict[str, Any], what: str
) -> None:
    save_gpt2(tmp_path / "gpt2")
    raw = classify.recipe(tmp_path, student=student)
    if "model" in student:
        student["model"] = str(tmp_path / "gpt2")
    assert what in error_of_check_and_run(raw, tmp_path)


def test_a_student_that_cannot_be_built_is_rejected_before_the_judgment(tmp_path: Path) -> None:
    raw = classify.recipe(tmp_path)
    raw["student"]["hidden_size"] = 64  # the teacher's embeddings have 32
    with pytest.raises(StillhouseError, match="use a smaller hidden_size"):
        run(raw)
    assert not [*(tmp_path / "run" / "stages").glob("*judgment*")]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"filters": {"require_pattern": "("}}, "not a regular expression"),
        ({"filters": {"languages": ["zz"]}}, "zz"),
        ({"evaluate": {"judge": {"model": "./nowhere"}}}, "no model"),
        ({"evaluate": {"scorer": "nowhere.py:score"}}, "nowhere.py"),
    ],
)
def test_invalid_options_of_answers_are_an_error(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    assert what in error_of_check_and_run(
        answering.recipe(tmp_path, "generate", **changes), tmp_path
    )


@pytest.mark.parametrize(
    ("filters", "where"),
    [
        ({"forbid_pattern": "["}, "filters.forbid_pattern"),
        ({"languages": ["zz"]}, "filters.languages"),
        ({"best_of": {"kind": "majority", "pattern": "("}}, "filters.best_of.pattern"),
    ],
)
def test_an_error_in_a_filter_names_its_key_in_the_recipe(
    tmp_path: Path, filters: dict[str, Any], where: str
) -> None:
    raw = answering.recipe(tmp_path, "generate", filters=filters)
    raw["teacher"] |= {"samples": 2, "sampling": {"temperature": 1.0}}
    with pytest.raises(StillhouseError) as caught:
        run(answering.clean(raw))
    assert caught.value.where == where


def test_a_schema_that_allows_anything_is_an_error(tmp_path: Path) -> None:
    raw = answering.recipe(tmp_path, "extract")
    (tmp_path / "schema.json").write_text('{"name": "string", "age": "integer"}')
    assert "allows any answer" in error_of_check_and_run(raw, tmp_path)


@pytest.mark.parametrize("kind", ["extract", "classify"])
def test_a_missing_api_key_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    api = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "key_env": "SOME_KEY"}
    if kind == "extract":
        raw = answering.recipe(tmp_path, kind)
        raw |= answering.api(tmp_path, api["base_url"])
        raw["teacher"]["api"] = api
    else:
        raw = classify.recipe(tmp_path)
        raw["teacher"] = {"api": api}
        raw["student"] |= {"tokenizer": str(tmp_path / "teacher"), "teacher_embeddings": False}
    assert "SOME_KEY is not set" in error_of_check_and_run(raw, tmp_path)


def test_a_hub_model_while_offline_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny.recipe(tmp_path)
    raw["teacher"]["model"] = "nobody/nothing-of-that-name"
    assert "the Hub cannot be reached" in error_of_check_and_run(raw, tmp_path)


def test_texts_are_cut_to_the_positions_of_an_encoder(tmp_path: Path) -> None:
    """RoBERTa's table has rows before the first position, so that 514 rows allow 512 tokens."""
    raw = classify.recipe(tmp_path, data={"texts": [{"path": str(tmp_path / "long.jsonl")}]})
    rows = [{"text": f"{word} " * 40} for _, word, _ in classify.rows(40)]
    text = "".join(json.dumps({"text": f"{n} {row['text']}"}) + "\n" for n, row in enumerate(rows))
    (tmp_path / "long.jsonl").write_text(text)
    config = RobertaConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=16, intermediate_size=16, pad_token_id=0,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=66, type_vocab_size=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path / "encoder")
    tiny.tokenizer().save_pretrained(tmp_path / "encoder")
    raw["student"] = {"start": "pretrained", "model": str(tmp_path / "encoder")}
    result = run(raw)
    assert result is not None
    assert "at most the first 65 tokens" in (result.model / "README.md").read_text()
