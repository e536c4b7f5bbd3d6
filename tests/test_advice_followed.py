"""Following the advice of an error to the letter works and loses nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.check import check_recipe
from stillhouse.commands import prepare_data, run
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.synthesis.answer_schema import read_schema
from stillhouse.synthesis.filters import Row, json_schema
from tests import tiny

pytestmark = pytest.mark.run

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello " * 8}]


def long_row(raw: dict[str, Any], folder: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"say {n}"}, CHAT[1]]} for n in range(60)]
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats))
    raw["data"]["sources"] = [{"kind": "jsonl", "path": str(file)}]


def one_document(raw: dict[str, Any], folder: Path) -> None:
    text = (folder / "text.txt").read_text().replace("\n", "\n\n")
    (folder / "text.txt").write_text(text)
    del raw["data"]["sources"][0]["documents"]


def no_pad(raw: dict[str, Any], folder: Path) -> None:
    file = folder / "teacher" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "pad_token_id": 9999}))


def mend_pad(raw: dict[str, Any], folder: Path, fix: str) -> None:
    """The advice: set pad_token_id in config.json to the tokenizer's padding or end token."""
    words = AutoTokenizer.from_pretrained(folder / "teacher")
    file = folder / "teacher" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "pad_token_id": words.pad_token_id}))


def pickled(raw: dict[str, Any], folder: Path) -> None:
    file = folder / "teacher" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def convert(raw: dict[str, Any], folder: Path, fix: str) -> None:
    """The advice: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), and a
    copy of the tokenizer's files."""
    new_folder = folder / "new"
    AutoModelForCausalLM.from_pretrained(folder / "teacher").save_pretrained(new_folder)
    for file in (folder / "teacher").glob("*token*"):
        (new_folder / file.name).write_bytes(file.read_bytes())
    template = folder / "teacher" / "chat_template.jinja"
    (new_folder / template.name).write_bytes(template.read_bytes())
    raw["teacher"]["model"] = str(new_folder)


def set_key(raw: dict[str, Any], folder: Path, fix: str) -> None:
    """Apply the first `section.key: value` of the advice, also if written with `=` or `to`."""
    path, value = re.findall(r"([a-z_]+(?:\.[a-z_]+)+)(?:: |=| to )(\w+)", fix)[0]
    put(raw, path, json.loads(value) if value.isdigit() or value == "false" else value)


def put(raw: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
    raw[key] = value


# case: (what spoils the recipe, a part of the error, what follows its advice)
FOLLOWED: dict[str, tuple[Callable[..., None], str, Callable[..., None]]] = {
    "a chat longer than the context": (long_row, "tokens; the context is", set_key),
    "one document": (
        one_document,
        "cannot be divided",
        lambda raw, folder, fix: raw["data"]["sources"][0].update(
            documents=re.findall(r"documents: ([\w-]+)", fix)[0]
        ),
    ),
    "a missing pad token": (no_pad, "pad_token_id is 9999", mend_pad),
    "pickled weights": (pickled, "a pickle can run any code", convert),
}


def errors(raw: dict[str, Any]) -> list[Any]:
    return [one for one in check_recipe(raw) if one.level == "error"]


@pytest.mark.parametrize("case", FOLLOWED)
def test_advice_works_when_it_is_followed(tmp_path: Path, case: str) -> None:
    spoil, problem, follow = FOLLOWED[case]
    raw = tiny.recipe(tmp_path)
    spoil(raw, tmp_path)
    if case == "one document":
        with pytest.raises(ValueError, match=problem) as caught:
            run(raw)
        fix = str(caught.value.fix)  # type: ignore[attr-defined]
    else:
        found = errors(raw)
        assert problem in found[0].text
        fix = found[0].fix
    follow(raw, tmp_path, fix)
    assert errors(raw) == []
    assert run(raw) is not None


def test_the_suggested_context_truncates_no_row(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    long_row(raw, tmp_path)
    set_key(raw, tmp_path, errors(raw)[0].fix)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(raw))
    _, train, heldout = prepare_data(file)
    for windows in (train, heldout):
        assert windows.info.rows_truncated == windows.info.rows_dropped == 0


def test_splitting_into_paragraphs_loses_no_text(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    one_document(raw, tmp_path)
    raw["data"]["sources"][0]["documents"] = "blank-line"
    raw["data"]["train_tokens"] = None
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(raw))
    _, train, heldout = prepare_data(file)
    text = (tmp_path / "text.txt").read_text()
    learned = train.supervised_tokens + heldout.supervised_tokens
    dropped = train.info.duplicates_dropped + heldout.info.duplicates_dropped
    assert dropped == 0
    # One token per byte. A document's first token is not predicted, but its end token is.
    assert learned >= len(text.replace("\n\n", "\n")) - text.count("\n\n")


def test_a_schema_fixed_as_suggested_restricts_answers(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    loose = {"properties": {"name": {"type": "string"}}}
    file.write_text(json.dumps(loose))
    with pytest.raises(ValueError, match="allows any answer"):
        read_schema(file)
    file.write_text(json.dumps({**loose, "type": "object", "required": ["name"]}))
    judge = json_schema(read_schema(file))
    assert judge(Row((), '{"name": "Ann"}', None, "")) is None
    assert judge(Row((), '{"x": 1}', None, "")) is not None


def test_the_signals_section_that_check_suggests_is_valid(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path, train={"epochs": 3})
    fix = next(one.fix for one in check_recipe(raw) if one.topic == "signals")
    assert "add `signals: {}`" in str(fix)
    raw["signals"] = {}
    parse_recipe(raw)
    assert errors(raw) == []
