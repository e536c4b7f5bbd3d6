"""How `stillhouse init` recognizes the text, labels, and chats in a user's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import DataError, StillhouseError
from stillhouse.init_answers import SIZES, init_answers
from stillhouse.init_sources import (
    first_questions,
    has_chats,
    label_column,
    text_column,
    training_sources,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exported(question: str) -> dict[str, Any]:
    """A chat of ChatGPT's data export."""

    def node(name: str, parent: str | None, role: str, text: str) -> dict[str, Any]:
        content = {"content_type": "text", "parts": [text]}
        message = {"author": {"role": role}, "content": content}
        return {"id": name, "parent": parent, "children": [], "message": message}

    mapping = {"u": node("u", None, "user", question), "a": node("a", "u", "assistant", "Yes.")}
    return {"title": "x", "mapping": mapping, "current_node": "a"}


# --- the text of a table ---------------------------------------------------------------------


def test_the_text_column_is_chosen_from_many_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first row's longest cell may be in another column."""
    rows = ["A rather long title here,short"]
    rows += [f"title {n},a long description of the issue number {n}" for n in range(9)]
    (folder / "a.csv").write_text("\n".join(["title,issue", *rows]))
    assert training_sources("a.csv", False) == [
        {"kind": "file", "text_key": "issue", "path": "a.csv"}
    ]
    assert "from column 'issue', not from 'title'" in capsys.readouterr().err


def test_numbers_and_dates_are_not_text() -> None:
    row = {"id": "123456789012345", "day": "2024-01-01T10:00:00", "note": "short"}
    with pytest.raises(DataError, match="no column contains text: the columns are id, day"):
        text_column([{key: row[key] for key in ("id", "day")}], "a.csv")


def test_a_column_of_labels_may_begin_with_an_empty_cell() -> None:
    assert label_column([{"text": "a", "label": ""}, {"text": "b", "label": 0}]) == "label"
    assert label_column([{"text": "a", "label": ""}, {"text": "b", "label": None}]) is None


@pytest.mark.parametrize(
    "first",
    [
        "101,hello there",
        "1,hello there",
        "2024-01-02,hello",
        "a@example.com,hello",
        "12.50,hello there",
    ],
)
def test_a_table_without_a_header_is_rejected(folder: Path, first: str) -> None:
    (folder / "a.csv").write_text(f"{first}\n7,and bye\n")
    with pytest.raises(DataError, match="seems to have no header"):
        training_sources("a.csv", False)


@pytest.mark.parametrize("names", ["0,1", "country,2019", "name,0", "name,1,2"])
def test_numbers_that_name_columns_are_a_header(folder: Path, names: str) -> None:
    (folder / "a.csv").write_text(f"{names}\nsome text{',7' * names.count(',')}\n")
    assert training_sources("a.csv", False)[0]["text_key"] == names.split(",")[0]


# --- folders -----------------------------------------------------------------------------------


def test_an_unpacked_chatgpt_export_is_read_as_its_chats(folder: Path) -> None:
    export = folder / "export"
    export.mkdir()
    (export / "user.json").write_text('{"id": "user"}')
    (export / "message_feedback.json").write_text("[]")
    (export / "chat.html").write_text("<html>")
    (export / "conversations.json").write_text(json.dumps([exported("Is it?")]))
    assert training_sources("export", False) == [
        {"kind": "file", "path": "export/conversations.json"}
    ]
    (export / "conversations.json").rename(export / "conversations-000.json")
    (export / "conversations-001.json").write_text(json.dumps([exported("Is it so?")]))
    (found,) = training_sources("export/", False)
    assert found["path"] == "export/conversations*.json"


def test_files_of_a_folder_that_are_not_read_are_listed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").write_text("one\n\ntwo\n\nthree\n")
    for name in ("a.pdf", "b.pdf", "c.docx", ".hidden.pdf"):
        (folder / name).write_text("x")
    assert training_sources(".", False)[0]["kind"] == "text"
    assert "not read: 2 .pdf, 1 .docx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "fix"),
    [(".pdf", "for each file, extract its text: pdftotext"), (".py", "papers/**/*.py")],
)
def test_the_error_about_a_folder_without_text_lists_its_files(
    folder: Path, ending: str, fix: str
) -> None:
    (folder / "papers").mkdir()
    for name in "ab":
        (folder / "papers" / f"{name}{ending}").write_text("x")
    with pytest.raises(DataError, match=f"no known file, but 2 {ending}") as error:
        training_sources("papers", False)
    assert fix in str(error.value.fix)


def test_source_code_is_text_if_its_extension_is_named(folder: Path) -> None:
    (folder / "a.py").write_text("import os\n\nx = 1\n\n")
    assert training_sources("*.py", False) == [
        {"kind": "text", "documents": "blank-line", "path": "*.py"}
    ]
    (folder / "b.bin").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match=r"extension \.bin are not supported"):
        training_sources("b.bin", False)


def test_the_error_about_a_zipped_export_says_how_to_unpack_it(folder: Path) -> None:
    (folder / "export.zip").write_bytes(b"PK\3\4")
    with pytest.raises(DataError) as error:
        training_sources("export.zip", False)
    assert f"unzip {folder / 'export.zip'} -d {folder / 'export'}" in str(error.value.fix)


# --- prompts -----------------------------------------------------------------------------------


def test_short_questions_from_chats_become_the_prompts_of_the_report(folder: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": question},
                {"role": "assistant", "content": "Yes."},
            ]
        }
        for question in ("Is it?", "long " * 200, "Is it?", "Is it so?", "And now?")
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = training_sources("a.jsonl", False)
    assert first_questions(sources, 2) == ["Is it?", "Is it so?"]
    assert has_chats(sources)
    (folder / "a.txt").write_text("Is this a question?\n" * 9)
    text = training_sources("a.txt", False)
    assert first_questions(text, 2) == []
    assert not has_chats(text)


# --- answers -----------------------------------------------------------------------------------


def test_an_invalid_answer_is_asked_for_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").write_text("one\n\ntwo\n\nthree\n")
    typed = iter(["Distil", "Distill", "./none", "pypi:x", "b.txt", "a.txt", "tiny", "LARGE", "x"])
    found = init_answers({}, lambda question, usual: next(typed), None, repeat=True)
    assert (found.job, found.teacher, found.data) == ("distill", "pypi:x", "a.txt")
    assert (found.size, str(found.out)) == ("large", "x")
    shown = capsys.readouterr().err
    for part in ("not a kind of job", "no model at", "did you mean a.txt?", "not a size"):
        assert part in shown


@pytest.mark.parametrize("size", ["tiny", "./none", "none.gguf"])
def test_a_size_that_is_neither_a_size_nor_a_model_is_rejected(folder: Path, size: str) -> None:
    (folder / "a.txt").write_text("one\n\ntwo\n\nthree\n")
    given = {"job": "distill", "teacher": "pypi:x", "data": "a.txt", "size": size, "out": "x.yaml"}
    with pytest.raises(StillhouseError):
        init_answers(given, lambda question, usual: usual, None)
    for sound in (*SIZES, "Small", "org/name", "pypi:y"):
        assert init_answers({**given, "size": sound}, lambda question, usual: usual, None)
