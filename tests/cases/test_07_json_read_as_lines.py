"""JSON and CSV files are read as rows, never as lines of plain text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stillhouse.cli import app
from stillhouse.config.load_recipe import load_recipe
from stillhouse.data.data_config import TextSource
from stillhouse.data.documents import AnyDocument, Conversation, Document
from stillhouse.data.sources import read_sources
from stillhouse.errors import DataError
from stillhouse.init_answers import init_answers
from stillhouse.tasks.labeled_texts import read_texts
from stillhouse.tasks.task_texts_config import TextFile
from tests import tiny

TEXTS = ["first message", "second message, with a comma"]
ROWS = json.dumps([{"text": text} for text in TEXTS], indent=1)
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]

# file: (its content, its documents)
FILES: dict[str, tuple[str, list[AnyDocument]]] = {
    "rows.json": (ROWS, [Document(text) for text in TEXTS]),
    "chats.json": (json.dumps([{"messages": CHAT}]), [Conversation(tuple(CHAT))]),
    "rows.csv": ("id,body\n" + "".join(f'1,"{t}"\n' for t in TEXTS), [Document(t) for t in TEXTS]),
    "rows.txt": ("\n".join(TEXTS), [Document(text) for text in TEXTS]),
    "rows.md": ("# One\n\nfirst\n\nsecond\n", [Document("# One\n"), Document("first\n"),
                Document("second\n")]),
}  # fmt: skip


def test_each_object_in_a_json_list_is_a_text_of_a_task(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(ROWS)
    assert [row.text for row in read_texts(TextFile(path="rows.json"), tmp_path)] == TEXTS


@pytest.mark.parametrize("name", FILES)
def test_init_writes_a_source_that_reads_the_file_in_its_own_format(
    name: str, tmp_path: Path
) -> None:
    content, documents = FILES[name]
    (tmp_path / name).write_text(content)
    tiny.save_model(tmp_path / "teacher")
    out = tmp_path / "recipe.yaml"
    told = ["--job", "distill", "--teacher", str(tmp_path / "teacher"), "--size", "small"]
    answer = CliRunner().invoke(
        app, ["init", *told, "--data", str(tmp_path / name), "--out", str(out)]
    )
    assert answer.exit_code == 0, answer.output
    assert list(read_sources(load_recipe(out).data.sources[:1], tmp_path)) == documents


@pytest.mark.parametrize(
    "name", ["rows.json", "rows.csv", "rows.jsonl", "rows.tsv", "rows.jsonl.gz"]
)
def test_a_file_of_rows_cannot_be_read_as_plain_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(ROWS)
    with pytest.raises(DataError, match="the recipe reads it as plain text") as caught:
        list(read_sources([TextSource(kind="text", path=name)], tmp_path))
    assert "kind: file" in str(caught.value.fix)
    # The other fix: a copy whose extension says that it is plain text.
    (tmp_path / "copy.txt").write_text(ROWS)
    (document,) = read_sources([TextSource(kind="text", path="copy.txt")], tmp_path)
    assert document == Document(ROWS)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("rows.docx", "pandoc"),
        ("rows.pdf", "pdftotext"),
        ("rows.xlsx", "CSV"),
        ("rows.zip", "unzip"),
        ("rows.tar.gz", "tar -xf"),
        ("rows.jsnl", ".jsonl"),
        ("rows", ".txt, .jsonl, .json, .csv, .tsv, or .parquet"),
        ("rows.gz", ".txt, .jsonl"),
    ],
)
def test_a_file_with_an_unknown_extension_is_rejected(name: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("one\ntwo\n")
    with pytest.raises(DataError) as caught:
        list(read_texts(TextFile(path=name), tmp_path))
    assert caught.value.where == str(tmp_path / name)
    assert fix in str(caught.value.fix)
    given = {"job": "distill", "teacher": "t", "data": str(tmp_path / name), "size": "small"}
    with pytest.raises(DataError) as caught:
        init_answers({**given, "out": "r.yaml"}, lambda question, usual: usual, None)
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize("name", ["chats.log", "chats.txt", "chats", "chats.jsonl"])
def test_init_from_logs_writes_a_source_that_reads_their_conversations(
    name: str, tmp_path: Path
) -> None:
    row = json.dumps({"messages": CHAT})
    (tmp_path / name).write_text(f"{row}\n" * 8)
    tiny.save_model(tmp_path / "teacher")
    out = tmp_path / "recipe.yaml"
    told = ["--job", "distill", "--teacher", str(tmp_path / "teacher"), "--size", "small"]
    answer = CliRunner().invoke(
        app, ["init", *told, "--from", str(tmp_path / name), "--out", str(out)]
    )
    assert answer.exit_code == 0, answer.output
    documents = list(read_sources(load_recipe(out).data.sources[:1], tmp_path))
    assert documents == [Conversation(tuple(CHAT))] * 8
