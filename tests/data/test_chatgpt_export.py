"""ChatGPT's data export: each chat's current branch is read, up to a turn that is not text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.documents import Conversation
from stillhouse.data.row_formats import document_from_row
from stillhouse.errors import DataError


def node(name: str, parent: str | None, role: str = "", text: str = "", **changes: Any) -> Any:
    """A node of the export's tree; it has no message if `role` is empty."""
    message = None
    if role:
        content = {"content_type": "text", "parts": [text]}
        message = {"author": {"role": role}, "content": content, **changes}
    return {"id": name, "message": message, "parent": parent, "children": []}


def export(*nodes: Any, last: str | None = None) -> dict[str, Any]:
    nodes = copy.deepcopy(nodes)
    mapping = {one["id"]: one for one in nodes}
    for one in nodes:
        if one["parent"] in mapping:
            mapping[one["parent"]]["children"].append(one["id"])
    row = {"title": "A title", "mapping": mapping, "current_node": last or nodes[-1]["id"]}
    return {**row, "create_time": 1.7e9, "conversation_id": "c"}


def read(row: dict[str, Any]) -> tuple[list[tuple[str, str]], tuple[str, ...]] | None:
    found = document_from_row(row, "text", "here")
    if found is None:
        return None
    assert isinstance(found, Conversation)
    assert found.about.format == "ChatGPT export"
    return [(m["role"], m["content"]) for m in found.messages], found.about.notes


START = (node("root", None), node("hello", "root", "system", ""))
ASKED = node("asked", "hello", "user", "What is 2 + 2?")
ANSWERED = node("answered", "asked", "assistant", "It is 4.")


def test_the_chat_is_the_branch_from_the_root_to_the_current_node() -> None:
    more = node("more", "answered", "user", "And twice that?")
    end = node("end", "more", "assistant", "8.")
    chat = [
        ("user", "What is 2 + 2?"),
        ("assistant", "It is 4."),
        ("user", "And twice that?"),
        ("assistant", "8."),
    ]
    assert read(export(*START, ASKED, ANSWERED, more, end)) == (chat, ())


def test_other_branches_are_left_out_with_a_note() -> None:
    rejected = node("rejected", "asked", "assistant", "It is 5.")
    found = read(export(*START, ASKED, rejected, ANSWERED))
    assert found is not None
    assert found[0] == [("user", "What is 2 + 2?"), ("assistant", "It is 4.")]
    assert "branch" in found[1][0]


@pytest.mark.parametrize(
    "extra",
    [
        {"content": {"content_type": "thoughts", "thoughts": []}},
        {"metadata": {"is_visually_hidden_from_conversation": True}},
        {"content": {"content_type": "user_editable_context", "parts": ["Be brief."]}},
    ],
)
def test_reasoning_and_hidden_messages_are_left_out(extra: dict[str, Any]) -> None:
    aside = node("aside", "asked", "assistant", "hidden", **extra)
    answered = {**ANSWERED, "parent": "aside"}
    found = read(export(*START, ASKED, aside, answered))
    assert found is not None
    assert found[0] == [("user", "What is 2 + 2?"), ("assistant", "It is 4.")]
    assert "left out" in found[1][0]


@pytest.mark.parametrize(
    "extra",
    [
        {"author": {"role": "tool"}},
        {"content": {"content_type": "code", "text": "print(4)"}},
        {"content": {"content_type": "multimodal_text", "parts": [{"asset_pointer": "x"}, "?"]}},
    ],
)
def test_a_chat_is_read_up_to_its_first_turn_that_is_not_text(extra: dict[str, Any]) -> None:
    more = node("more", "answered", "user", "Draw it.")
    other = node("other", "more", "assistant", "drawn", **extra)
    end = node("end", "other", "assistant", "Here it is.")
    found = read(export(*START, ASKED, ANSWERED, more, other, end))
    assert found is not None
    assert found[0] == [("user", "What is 2 + 2?"), ("assistant", "It is 4.")]
    assert "up to its first turn" in found[1][0]


def test_consecutive_messages_of_the_same_role_become_one_turn() -> None:
    second = node("second", "answered", "assistant", "Four, that is.")
    found = read(export(*START, ASKED, ANSWERED, second))
    assert found is not None
    assert found[0][-1] == ("assistant", "It is 4.\n\nFour, that is.")


def test_a_chat_without_an_answer_is_skipped() -> None:
    assert read(export(*START, ASKED)) is None


def test_a_broken_tree_is_rejected() -> None:
    with pytest.raises(DataError, match="tree is broken"):
        read(export(*START, ASKED, ANSWERED, last="gone"))
    loop = [{**ASKED, "parent": "answered"}, {**ANSWERED, "parent": "asked"}]
    with pytest.raises(DataError, match="tree is broken"):
        read(export(*loop))


def test_values_of_unexpected_types_are_treated_as_missing() -> None:
    odd = export(*START, ASKED, ANSWERED)
    odd["mapping"]["asked"]["parent"] = ["hello"]
    with pytest.raises(DataError, match="tree is broken"):
        read(odd)
    content = {"content_type": "text", "parts": 5}
    assert (
        read(export(*START, ASKED, node("answered", "asked", "assistant", "x", content=content)))
        is None
    )


def test_a_json_file_of_exported_chats_is_read(tmp_path: Path) -> None:
    from stillhouse.data.row_reader import read_rows

    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([export(*START, ASKED, ANSWERED)] * 2))
    rows = [read(dict(row)) for row, _ in read_rows(path)]
    assert [found is not None for found in rows] == [True, True]
