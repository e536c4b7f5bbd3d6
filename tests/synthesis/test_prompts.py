"""Reading prompts from files and logs, and the messages that the teacher and the student see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.words import words
from stillhouse.errors import DataError
from stillhouse.generation.chat_frame import Frame, answer_text, text_of
from stillhouse.generation.request import Answer
from stillhouse.synthesis.prompts import Prompt, read_prompts, unread_notes
from stillhouse.synthesis.synthesize import chosen_filters
from stillhouse.synthesis.synthesize_config import EvaluationTexts, FiltersRecipe

USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWERED = [USER, {"role": "assistant", "content": "4"}]


def read(path: Path, text: str, **options: Any) -> list[Prompt]:
    path.write_text(text, encoding="utf-8")
    return list(read_prompts(path, **options))


def contents(prompts: list[Prompt]) -> list[str]:
    return [text_of(prompt.messages) for prompt in prompts]


# --- formats -----------------------------------------------------------------------------------


def test_each_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    prompts = read(tmp_path / "p.txt", "one\n\n  two\nthree\n", limit=2)
    assert contents(prompts) == ["one", "two"]
    assert prompts[1].where.endswith("p.txt:3")


def test_the_input_of_an_instruction_is_sent_or_reported_as_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    row = json.dumps({"instruction": "Translate.", "input": "Guten Tag"}) + "\n"
    assert contents(read(path, row)) == ["Translate.\nGuten Tag"]
    assert unread_notes(path) == []
    assert contents(read(path, row, key="instruction")) == ["Translate."]
    (note,) = unread_notes(path, key="instruction")
    assert note.startswith("only `instruction` is sent, without `input` (")
    assert note.endswith("p.jsonl:1)")
    read(path, row.replace("Guten Tag", ""), key="instruction")
    assert unread_notes(path, key="instruction") == []


def test_a_context_that_is_not_sent_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    read(path, json.dumps({"prompt": "Who won?", "context": "Ann beat Bo."}) + "\n")
    assert unread_notes(path) != []


def test_csv_prompts_are_in_one_column(tmp_path: Path) -> None:
    text = 'id,question\n1,"Why, he asked?"\n2,"Two\nlines"\n'
    assert contents(read(tmp_path / "p.csv", text, key="question")) == [
        "Why, he asked?",
        "Two\nlines",
    ]
    assert contents(read(tmp_path / "p.tsv", "prompt\tn\nhello\t1\n")) == ["hello"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER["content"]},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"messages": ANSWERED},
        {"request": {"model": "m", "messages": [USER]}, "response": {"choices": []}},
        {"custom_id": "1", "method": "POST", "body": {"model": "m", "messages": [USER]}},
        {
            "object": "chat.completion",
            "id": "chatcmpl-1",
            "choices": [{"message": {"role": "assistant", "content": "4"}}],
            "messages": {"object": "list", "data": [{**USER, "id": "chatcmpl-1-0", "name": None}]},
        },
        {"input": [USER], "output": [ANSWERED[1]]},
    ],
    ids=["prompt", "messages as prompt", "chat", "answered chat", "gateway log", "batch input",
         "stored completion", "input and output"],
)  # fmt: skip
def test_prompts_are_found_in_every_log_format(tmp_path: Path, row: dict[str, Any]) -> None:
    (prompt,) = read(tmp_path / "p.jsonl", json.dumps(row) + "\n")
    assert prompt.messages == (USER,)


def test_one_json_file_may_contain_all_rows(tmp_path: Path) -> None:
    rows = [{"messages": ANSWERED}, {"messages": [USER]}]
    for whole in (rows, {"object": "list", "data": rows}):
        assert len(read(tmp_path / "p.json", json.dumps(whole))) == 2


def test_a_chat_is_cut_after_its_last_user_turn(tmp_path: Path) -> None:
    again = {"role": "user", "content": "And 3 + 3?"}
    chat = [*ANSWERED, again, {"role": "assistant", "content": "6"}]
    (prompt,) = read(tmp_path / "p.jsonl", json.dumps({"messages": chat}))
    assert prompt.messages == (*ANSWERED, again)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "Invalid JSON"),
        ("p.jsonl", '{"question": "a"}\n', "no `prompt` and no `messages`"),
        ("p.jsonl", '{"prompt": " "}\n', "the prompt is empty"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "no user turn"),
        ("p.jsonl", '{"messages": [{"text": "a"}]}', "a message has no role"),
        ("p.jsonl", "3\n", "is a JSON int, not an object"),
        ("p.json", '{"prompt": "a"}', "neither a list"),
        ("p.csv", "question\nwhy?\n", "its keys are question"),
        ("p.txt", "\n\n", "contains no text"),
    ],
)
def test_the_error_for_a_row_that_is_not_a_prompt_names_the_file(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        read(tmp_path / name, text)
    assert name in str(caught.value.where)


def test_the_error_names_the_key_that_chooses_the_column(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"ask": "a"}\n')
    section = FiltersRecipe(decontaminate=EvaluationTexts(path="p.jsonl"))
    with pytest.raises(DataError) as caught:
        chosen_filters(section, tmp_path, "filters")
    assert str(caught.value.fix).endswith("set filters.decontaminate.key to that key")
    with pytest.raises(DataError) as caught:
        list(read_prompts(tmp_path / "p.jsonl"))
    assert str(caught.value.fix).endswith("set synthesize.prompts.key to that key")


# --- rows in training-data formats ---------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be brief."}
BRIEF = (SYSTEM, USER)


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "messages": ANSWERED},
        {"system": "Be brief.", "prompt": USER["content"]},
        {"system": [{"type": "text", "text": "Be brief."}], "messages": [USER]},
        {"request": {"system": "Be brief.", "messages": [USER]}},
        {"system_prompt": "Be brief.", "question": USER["content"], "answer": "4"},
        {"messages": json.dumps([SYSTEM, *ANSWERED])},
        {"messages": {"role": ["System", "user"], "content": ["Be brief.", USER["content"]]}},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": "4"},
            ]
        },
    ],
    ids=["system and chat", "system and prompt", "system parts", "system of a request", "question",
         "JSON text", "one list per key", "ShareGPT"],
)  # fmt: skip
def test_rows_of_training_data_become_prompts_with_their_system_message(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    (prompt,) = read(tmp_path / "p.jsonl", json.dumps(row) + "\n")
    assert prompt.messages == BRIEF


def test_an_instruction_keeps_its_input(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    (prompt,) = read(tmp_path / "p.json", json.dumps([row]))
    assert prompt.messages == ({"role": "user", "content": "Add.\n2 and 2"},)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER], "tools": [{"type": "function"}]}, "`tools`"),
        ({"request": {"messages": [USER], "tools": [{"type": "function"}]}}, "`tools`"),
        ({"messages": [USER], "images": ["a.png"]}, "only text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
        ({"system": "Be long.", "messages": list(BRIEF)}, "its messages have a different one"),
    ],
)
def test_content_that_would_not_be_sent_or_learned_is_rejected(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        read(tmp_path / "p.jsonl", json.dumps(row) + "\n")
    assert str(caught.value.where).endswith("p.jsonl:1")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list(read_prompts(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"masked": True}])
def test_a_prompt_with_a_turn_that_must_not_be_learned_is_rejected(
    tmp_path: Path, flag: dict[str, Any]
) -> None:
    """Training on the synthesized chat would learn the turn. The last turn is not in the prompt."""
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "bad", **flag},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "good", **flag},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match="message 1 is an assistant turn that must not be"):
        list(read_prompts(path))
    assert len(list(read_prompts(path, learned=False))) == 1
    path.write_text(json.dumps({"messages": turns[2:]}) + "\n")
    assert len(list(read_prompts(path))) == 1


def test_every_character_is_a_word_in_scripts_without_spaces() -> None:
    assert words("Re-type 3 Wörter!") == ["re", "type", "3", "wörter"]
    assert words("用GPT写诗。") == ["用", "gpt", "写", "诗"]
    assert words("カードは、いつ") == list("カードはいつ")
    assert words("카드가 왔다") == ["카드가", "왔다"]
    assert len(words("สวัสดี")) == 6


# --- what the teacher and the student see ------------------------------------------------------


def test_the_teacher_sees_the_complete_frame_and_the_student_the_chosen_part() -> None:
    prompt = Prompt((USER,), "here")
    system = {"role": "system", "content": "Be brief."}
    few = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    for shown, expected in (
        ("prompt", [USER]),
        ("system", [system, USER]),
        ("all", [system, *few, USER]),
    ):
        frame = Frame("Be brief.", (("1 + 1?", "2"),), shown)  # type: ignore[arg-type]
        assert list(frame.teacher_sees(prompt.messages)) == [system, *few, USER]
        assert list(frame.student_sees(prompt.messages)) == expected


def test_a_prompt_keeps_its_own_system_message() -> None:
    own = {"role": "developer", "content": "Be long."}
    frame = Frame("Be brief.", (("a", "b"),))
    asked = frame.teacher_sees((own, USER))
    assert [message["content"] for message in asked] == ["Be long.", "a", "b", USER["content"]]


# --- reasoning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "stripped", "kept"),
    [
        (Answer("4"), "4", "4"),
        (Answer("<think>2 and 2</think>\n4"), "4", "<think>\n2 and 2\n</think>\n\n4"),
        (Answer("2 and 2</think>4"), "4", "<think>\n2 and 2\n</think>\n\n4"),
        (Answer("4", reasoning="2 and 2"), "4", "<think>\n2 and 2\n</think>\n\n4"),
        (Answer("<think>2 and"), "", ""),
        (Answer("<think></think>4"), "4", "4"),
    ],
    ids=["none", "in the text", "opened by the template", "separate", "cut off", "empty"],
)
def test_reasoning_is_kept_or_stripped(answer: Answer, stripped: str, kept: str) -> None:
    assert answer_text(answer, keep_reasoning=False) == stripped
    assert answer_text(answer, keep_reasoning=True) == kept
