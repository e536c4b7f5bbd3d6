"""Reading rows in every format and compression, and the errors for files that are unreadable."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.classify.classify_config import ClassifyTask
from stillhouse.classify.task_texts import task_labels
from stillhouse.data import row_reader
from stillhouse.data.data_config import FileSource, Source
from stillhouse.data.data_files import open_text, text_size
from stillhouse.data.documents import Document
from stillhouse.data.file_search import find_files
from stillhouse.data.row_reader import read_lines, read_rows
from stillhouse.data.sources import read_sources
from stillhouse.errors import DataError
from stillhouse.generation.chat_frame import text_of
from stillhouse.synthesis.prompts import read_prompts
from stillhouse.tasks.labeled_texts import (
    arriving_texts,
    file_texts,
    first_rows,
    read_texts,
    stream_texts,
)
from stillhouse.tasks.task_texts_config import TextFile

ROWS = [{"text": "one, é", "label": "a"}, {"text": "two\nlines", "label": "b"}]
TEXTS = [row["text"] for row in ROWS]


def as_csv(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def as_parquet() -> bytes:
    file = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    file = pa.BufferOutputStream()
    with pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(content)
    return file.getvalue().to_pybytes()


# extension: (content, location of the second row)
FILES: dict[str, tuple[bytes, str]] = {
    ".jsonl": ("\n".join(map(json.dumps, ROWS)).encode(), ":2"),
    ".json": (json.dumps({"object": "list", "data": ROWS}).encode(), " row 1"),
    ".csv": (as_csv(","), ":4"),
    ".tsv": (as_csv("\t"), ":4"),
    ".parquet": (as_parquet(), " row 1"),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".GZ": gzip.compress,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("extension", FILES)
def test_every_reader_gets_the_same_rows_from_every_format_and_compression(
    extension: str, compression: str, tmp_path: Path
) -> None:
    content, where = FILES[extension]
    path = tmp_path / f"rows{extension}{compression}"
    path.write_bytes(COMPRESSIONS[compression](content))
    assert list(read_rows(path)) == [
        (ROWS[0], str(path) + {":4": ":2", ":2": ":1"}.get(where, " row 0")),
        (ROWS[1], str(path) + where),
    ]
    documents = read_sources([FileSource(kind="file", path=path.name)], tmp_path)
    assert list(documents) == [Document(text) for text in TEXTS]
    assert [text_of(prompt.messages) for prompt in read_prompts(path, key="text")] == TEXTS
    texts = read_texts(TextFile(path=path.name, label="label"), tmp_path)
    assert [(row.text, row.gold) for row in texts] == [(row["text"], row["label"]) for row in ROWS]
    assert list(file_texts(path, "text")) == TEXTS
    assert first_rows(path.name, tmp_path) == ROWS[:1]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_plain_text_is_read_as_one_row_per_line_or_as_one_document(
    compression: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESSIONS[compression]("\ufeffone\r\n\n é two \n".encode()))
    assert list(read_rows(path, text_key="prompt")) == [
        ({"prompt": "one"}, f"{path}:1"),
        ({"prompt": "é two"}, f"{path}:3"),
    ]
    for source in (FileSource(kind="file", path=path.name), FileSource(kind="file", path=".")):
        assert list(read_sources([source], tmp_path)) == [Document("one\n\n é two \n")]


@pytest.mark.parametrize("extension", [e for e in FILES if e != ".parquet"])
def test_the_kind_of_a_source_sets_the_format_of_a_file_without_extension(
    extension: str, tmp_path: Path
) -> None:
    (tmp_path / "rows").write_bytes(FILES[extension][0])
    source = FileSource.model_validate({"kind": extension[1:], "path": "rows"})
    assert list(read_sources([source], tmp_path)) == [Document(text) for text in TEXTS]


def test_files_of_all_formats_are_found_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.csv", "a.jsonl.gz", "deep/c.parquet", "notes.md", "d.txt"):
        (tmp_path / name).write_bytes(gzip.compress(b"x") if name.endswith("gz") else b"x")
    names = [path.name for path in find_files(".", tmp_path)]
    assert names == ["a.jsonl.gz", "b.csv", "d.txt", "c.parquet"]
    assert [path.name for path in find_files(".", tmp_path, "jsonl")] == ["a.jsonl.gz"]
    assert [path.name for path in find_files("*.md", tmp_path)] == ["notes.md"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no known file"):
        find_files("empty", tmp_path)


def test_separately_compressed_parts_are_read_as_one_file(tmp_path: Path) -> None:
    for end, compress in ((".gz", gzip.compress), (".zst", zstd)):
        path = tmp_path / f"a.jsonl{end}"
        path.write_bytes(compress(b'{"text": "a"}\n{"te') + compress(b'xt": "b"}\n'))
        assert [row["text"] for row, _ in read_rows(path)] == ["a", "b"]


def test_the_size_of_a_compressed_text_is_estimated_as_three_times_its_file(tmp_path: Path) -> None:
    plain, small = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text("some words of text " * 50)
    small.write_bytes(gzip.compress(plain.read_bytes()))
    assert text_size(plain) == 950
    assert text_size(small) == 3 * small.stat().st_size


def test_a_json_file_may_contain_a_list_of_strings_or_a_list_under_a_key(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["one", "two"]')
    assert [text_of(p.messages) for p in read_prompts(tmp_path / "a.json")] == ["one", "two"]
    assert [row.text for row in read_texts(TextFile(path="a.json"), tmp_path)] == ["one", "two"]
    (tmp_path / "b.json").write_text('{"version": 1, "rows": [{"text": "one"}]}')
    assert [row["text"] for row, _ in read_rows(tmp_path / "b.json")] == ["one"]


@pytest.mark.parametrize(
    "text",
    ['[{"text": "one"}, {"text": "two"}]', '\n{"data": [{"text": "one"},\n{"text": "two"}]}\n\n'],
    ids=["a line", "lines"],
)
def test_a_json_document_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path, read = tmp_path / "a.json", []

    @contextmanager
    def counted(*arguments: Any) -> Iterator[Any]:
        with open_text(*arguments) as lines:
            read.append(arguments)
            yield lines

    monkeypatch.setattr(row_reader, "open_text", counted)
    path.write_text(text)
    assert [row["text"] for row, _ in read_rows(path)] == ["one", "two"]
    assert len(read) == 1


def test_a_stream_is_read_like_a_file() -> None:
    lines = io.StringIO('plain\n\n{"text": "an object"}\n')
    assert list(stream_texts(lines, "text")) == ["plain", "an object"]
    for wrong, said in (('{"text": ', "Invalid JSON"), ('{"words": "a"}', "no text under 'text'")):
        with pytest.raises(DataError, match=said) as caught:
            list(stream_texts(io.StringIO(f"plain\n{wrong}\n"), "text"))
        assert caught.value.where == "standard input:2"
    assert list(read_lines(["[1]\n"], "here", "text")) == [({"text": "[1]"}, "here:1")]


def test_lines_of_a_pipe_are_read_as_soon_as_they_arrive() -> None:
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as stream:
        texts = arriving_texts(stream, "text")
        os.write(writing, "one\n\ntwö\nth".encode())
        assert list(next(texts)) == ["one", "twö"]
        os.write(writing, b"ree\r\n")
        assert list(next(texts)) == ["three"]
        os.write(writing, b'{"words": 1}\nlast')
        with pytest.raises(DataError) as caught:
            list(next(texts))
        assert caught.value.where == "standard input:5"
        os.close(writing)
        assert [list(group) for group in texts] == [["last"]]


@pytest.mark.parametrize("rest", [b"\xe9\n", b"\xc3"])
def test_a_pipe_that_is_not_utf8_is_rejected(rest: bytes) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"caf" + rest), "utf-8")
    with pytest.raises(DataError, match="not UTF-8"):
        list(arriving_texts(stream, "text"))


# --- rejected files --------------------------------------------------------------------------

# name: (content, message, location, fix)
WRONG: dict[str, tuple[bytes, str, str, str]] = {
    "a.json": (b'[{"text": "a"},\n 5]', "JSON int, not an object", " row 1", "as an object"),
    "b.json": (b'[{"text": "a"},\n {', "Invalid JSON: .* line 2, column", "", "correct"),
    "c.json": (
        b'{"a": [], "b": []}',
        "neither a list nor an object with a",
        "",
        ".jsonl",
    ),
    "a.csv": (b"text,label\na,b\na,b,c\n", "more cells than the 2 columns", ":3", "double quotes"),
    "b.csv": (b'text\n"never closed\n', "not valid CSV", ":2", "close its quotes"),
    "a.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "byte 0xe9 in line 2", "", "iconv"),
    "c.csv": (b"text\na\nb\ncaf\xe9\n", "byte 0xe9 in line 4", "", "iconv"),
    "a.txt.gz": (gzip.compress(b"caf\xe9"), "byte 0xe9 in line 1", "", "iconv"),
    "a.csv.gz": (gzip.compress(as_csv(",") * 99)[:-9], "cannot be read: Trunc", "", "damaged"),
    "a.json.zst": (b"{} or so, not compressed", "cannot be read: ZSTD", "", "match its extension"),
    "a.parquet": (b"PAR1 not at all", "cannot be read", "", "damaged"),
    "a.parquet.xz": (b"\xfd7zXZ\0 not at all", "cannot be read", "", "damaged"),
    "a.parquet.gz": (gzip.compress(as_parquet()[:200]), "cannot be read", "", "damaged"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_about_unreadable_rows_give_their_location(name: str, tmp_path: Path) -> None:
    content, what, where, fix = WRONG[name]
    path = tmp_path / name
    path.write_bytes(content)
    readers: list[Callable[[], Any]] = [
        lambda: list(read_rows(path)),
        lambda: list(read_sources([FileSource(kind="file", path=name)], tmp_path)),
        lambda: list(read_prompts(path, key="text")),
        lambda: list(read_texts(TextFile(path=name), tmp_path)),
    ]
    for read in readers:
        with pytest.raises(DataError, match=what) as caught:
            read()
        assert caught.value.where == f"{path}{where}"
        assert caught.value.fix
        assert fix in caught.value.fix


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("text\n")
    source: Source = FileSource(kind="file", path="empty.csv")
    for read in (
        lambda: list(read_sources([source], tmp_path)),
        lambda: list(read_prompts(tmp_path / "empty.csv")),
        lambda: first_rows("empty.csv", tmp_path),
    ):
        with pytest.raises(DataError, match="contains no text"):
            read()
    for name in ("empt.csv", "empt.csv.gz"):
        with pytest.raises(DataError, match="does not exist") as caught:
            list(read_rows(tmp_path / name))
        assert caught.value.fix == "did you mean empty.csv?"


# --- JSON that parsers interpret differently ---------------------------------------------------

JSON_LINES = {
    '{"text": "a", "text": "b"}': "the key 'text' occurs twice",
    '{"text": "a", "x": [{"k": 1, "k": 2}]}': "the key 'k' occurs twice",
    '{"text": "a\\ud83d"}': "half of a surrogate pair",
    '{"text": "a", "\\udc00": 1}': "half of a surrogate pair",
    '{"text": "a", "x": ' + "[" * 101 + "]" * 101 + "}": "more than 100 levels",
    '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
    '{"text": "a", "x": ' + "9" * 5000 + "}": "more than 4,300 digits",
    "{'text': 'a'}": "Invalid JSON",
    '{"text": "a"},': "Invalid JSON: Extra data",
    '{"text": "a"} {"text": "b"}': "Invalid JSON: Extra data",
}


@pytest.mark.parametrize("line", JSON_LINES, ids=[line[:40] for line in JSON_LINES])
def test_ambiguous_or_invalid_json_is_rejected_with_its_location(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    (tmp_path / "a.json").write_text(f'[{{"text": "fine"}}, {line}]')
    with pytest.raises(DataError, match=JSON_LINES[line]) as caught:
        list(read_rows(tmp_path / "a.jsonl"))
    assert caught.value.where == f"{tmp_path / 'a.jsonl'}:2"
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / "a.json"))
    with pytest.raises(DataError, match=JSON_LINES[line]) as caught:
        list(stream_texts(io.StringIO(f"{line}\n"), "text"))
    assert caught.value.where == "standard input:1"


def test_complete_surrogate_pairs_and_separators_are_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00 \u2028 \u0085"}\n')
    ((row, _),) = read_rows(tmp_path / "a.jsonl")
    assert row == {"text": "😀 \u2028 \u0085"}


def test_a_stream_that_is_not_utf8_is_rejected() -> None:
    raw = io.BytesIO("café\n".encode("latin-1"))
    for errors in ("strict", "surrogateescape"):
        raw.seek(0)
        stream = io.TextIOWrapper(io.BytesIO(raw.getvalue()), "utf-8", errors=errors)
        with pytest.raises(DataError, match="not UTF-8"):
            list(stream_texts(stream, "text"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(stream_texts(io.StringIO("h\0e\0"), "text"))
    assert list(stream_texts(io.StringIO("\ufeffone\n"), "text")) == ["one"]


def test_a_note_says_that_lines_of_plain_text_are_json_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text('{"text": "a"}\n')
    assert [row["text"] for row, _ in read_rows(tmp_path / "a.txt")] == ['{"text": "a"}']
    assert "rename it to .jsonl if they are rows" in " ".join(capsys.readouterr().err.split())


def test_a_requested_key_that_a_row_lacks_is_an_error(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": chat, "prompt": "a", "completion": "b"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    source = FileSource(kind="file", path="a.jsonl", text_key="body")
    with pytest.raises(DataError, match="has no `body`"):
        list(read_sources([source], tmp_path))
    with pytest.raises(DataError, match="has no `question`"):
        list(read_prompts(tmp_path / "a.jsonl", key="question"))


def test_labels_are_read_from_a_file_in_any_format(tmp_path: Path) -> None:
    files = {
        "a.txt": "\ufeffspam\nham\n",
        "b.labels": "spam\nham\n",
        "c.json": '["spam", "ham"]',
        "d.csv": "label,id\nspam,1\nham,2\n",
        "e.jsonl": '{"label": "spam"}\n{"label": "ham"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        task = ClassifyTask(kind="classify", labels_path=name)
        assert list(task_labels(task, tmp_path, [])) == ["spam", "ham"]
