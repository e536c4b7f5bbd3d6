"""Prompts for on-policy distillation, rendered as token ids with the student's template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.chat_prompt import chat_ids
from stillhouse.data.data import Data
from stillhouse.errors import DataError, ModelError
from stillhouse.training.own_prompts import (
    OwnPrompts,
    made_prompts,
    prompts_of_windows,
    read_own_prompts,
    require_room,
    require_tokens,
)
from stillhouse.training.train_config import OnPolicyPrompts
from tests import tiny

WORDS = tiny.tokenizer()


def listed(prompts: OwnPrompts) -> list[list[int]]:
    return [prompts[index] for index in range(len(prompts))]


def test_repeated_prompts_are_kept_once() -> None:
    prompts = OwnPrompts.of([[1, 2], [3], [1, 2]])
    assert listed(prompts) == [[1, 2], [3]]
    assert prompts.lengths.tolist() == [2, 1]
    assert prompts.fingerprint != OwnPrompts.of([[1], [2, 3]]).fingerprint


def test_prompts_from_chats_leave_out_the_last_answer() -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    chats = [[*turns, {"role": "assistant", "content": f"answer {n}"}] for n in range(40)]
    chats += [[{"role": "user", "content": f"{n}?"}, turns[1]] for n in range(40)]
    data = Data.build(chats, WORDS, context=64, heldout_tokens=64)
    found = {tuple(prompt) for prompt in listed(prompts_of_windows(data.train))}
    assert tuple(chat_ids(WORDS, turns)) in found
    expected = {tuple(chat_ids(WORDS, [{"role": "user", "content": f"{n}?"}])) for n in range(40)}
    assert found - {tuple(chat_ids(WORDS, turns))} <= expected


def test_a_file_of_prompts_is_rendered_by_the_students_template(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?"}, {"messages": [{"role": "user", "content": "How?"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = OnPolicyPrompts(path="prompts.jsonl", system="Be brief.")
    found = listed(read_own_prompts(section, tmp_path, WORDS))
    system = {"role": "system", "content": "Be brief."}
    asked = [[system, {"role": "user", "content": text}] for text in ("Why?", "How?")]
    assert found == [chat_ids(WORDS, chat) for chat in asked]


def test_prompts_in_memory_may_have_any_form() -> None:
    chat = [{"role": "user", "content": "Why?"}]
    for item in ("Why?", chat, {"messages": chat}, {"prompt": "Why?"}, chat_ids(WORDS, chat)):
        assert listed(made_prompts([item], WORDS)) == [chat_ids(WORDS, chat)]


def test_prompts_that_fill_the_context_are_one_message() -> None:
    with pytest.raises(DataError, match=r"1 of 2 prompts fill the context of 8 tokens"):
        require_room(OwnPrompts.of([[1], list(range(8))]), 8)
    require_room(OwnPrompts.of([[1], list(range(7))]), 8)


@pytest.mark.parametrize("id_", [-1, 30])
def test_ids_of_another_tokenizer_are_one_message(id_: int) -> None:
    with pytest.raises(DataError, match=f"the token id {id_}, but the student has 30 tokens"):
        require_tokens(OwnPrompts.of([[1], [2, id_, 3]]), 30)
    require_tokens(OwnPrompts.of([[0, 29]]), 30)


def test_prompts_of_text_require_a_chat_template() -> None:
    plain = tiny.tokenizer()
    plain.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        made_prompts(["Why?"], plain)
    assert listed(made_prompts([[1, 2]], plain)) == [[1, 2]]


ANSWERED = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def test_the_error_for_a_row_without_a_prompt_names_the_key_of_its_section(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"ask": "Why?"}\n')
    with pytest.raises(DataError, match="no `prompt`") as caught:
        read_own_prompts(OnPolicyPrompts(path="prompts.jsonl"), tmp_path, WORDS)
    assert str(caught.value.fix).endswith("set train.on_policy.prompts.key to that key")


def test_a_prompt_may_have_turns_that_data_does_not_train_on(tmp_path: Path) -> None:
    context_only: dict[str, Any] = {**ANSWERED[1], "weight": 0}
    chat = [ANSWERED[0], context_only, {"role": "user", "content": "three"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    expected = [chat_ids(WORDS, [*ANSWERED, chat[2]])]
    section = OnPolicyPrompts(path="prompts.jsonl")
    assert listed(read_own_prompts(section, tmp_path, WORDS)) == expected
    assert listed(made_prompts([chat], WORDS)) == expected


def test_what_a_prompt_cannot_show_is_rejected_in_every_form(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "prompt": "Why?",
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    for section in (OnPolicyPrompts(path="rows.jsonl"), OnPolicyPrompts(dataset="rows")):
        with pytest.raises(DataError, match="`tools`, which are not sent"):
            read_own_prompts(section, tmp_path, WORDS)
    with pytest.raises(DataError, match="`tools`, which are not sent"):
        made_prompts([row], WORDS)


@pytest.mark.parametrize("given", [3, {"a": 1}, [1.5], [""], [[2**40]], [[1, -(2**40)]]])
def test_invalid_prompts_are_an_error(given: object) -> None:
    with pytest.raises(DataError):
        made_prompts(given, WORDS)
