"""Files whose content does not match their name, and paths that are not regular files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.data.data_config import FileSource
from stillhouse.data.data_files import format_of
from stillhouse.data.file_search import find_files
from stillhouse.data.row_reader import read_rows
from stillhouse.data.sources import read_sources
from stillhouse.errors import DataError, StillhouseError
from stillhouse.language_model.synthesis_stage import _content
from stillhouse.synthesis.prompts import read_prompts
from stillhouse.tasks.labeled_texts import read_texts
from stillhouse.tasks.task_texts_config import TextFile

ROW = b'{"text": "a"}\n'


def refused(path: Path) -> DataError:
    """The error for a file, which must be the same from every reader."""
    said = []
    for read in (
        lambda: list(read_rows(path)),
        lambda: list(read_sources([FileSource(kind="file", path=path.name)], path.parent)),
        lambda: list(read_prompts(path, key="text")),
        lambda: list(read_texts(TextFile(path=path.name), path.parent)),
    ):
        with pytest.raises(DataError) as caught:
            read()
        said.append(caught.value)
    assert len({str(error) for error in said}) == 1
    return said[0]


def archive(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr(name, "content")
    return file.getvalue()


def tar(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as packed:
        info = tarfile.TarInfo(name)
        info.size = len(ROW)
        packed.addfile(info, io.BytesIO(ROW))
    return file.getvalue()


def parquet() -> bytes:
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a"]}), file)
    return file.getvalue().to_pybytes()


# name: (content, message, fix)
CONTENTS: dict[str, tuple[bytes, str, str]] = {
    "a.jsonl": (gzip.compress(ROW), "gzip-compressed", "add .gz"),
    "b.jsonl": (bz2.compress(ROW), "bzip2-compressed", "add .bz2"),
    "c.txt": (lzma.compress(ROW), "xz-compressed", "add .xz"),
    "d.jsonl.gz": (gzip.compress(gzip.compress(ROW)), "compressed twice", "once-d.jsonl.gz"),
    "d.jsonl.xz": (lzma.compress(gzip.compress(ROW)), "compressed twice", "once-d.jsonl.gz"),
    "e.csv": (parquet(), "a Parquet file", "name it .parquet"),
    "f.csv": (archive("[Content_Types].xml"), "an office document", "as CSV"),
    "g.txt": (archive("word/document.xml"), "an office document", ".txt"),
    "h.jsonl": (archive("a.jsonl"), "a ZIP archive", "unzip"),
    "h.csv": (tar("a.csv"), "a tar archive", "tar -xf"),
    "h.jsonl.gz": (gzip.compress(tar("a.jsonl")), "a tar archive", "tar -xf"),
    "i.txt": (b"%PDF-1.7\n%\xe2\xe3", "a PDF", "pdftotext"),
    "j.parquet": (b"version https://git-lfs.github.com/spec/v1\noid x\n", "LFS", "git lfs pull"),
    "k.json": (b"\n<!DOCTYPE html>\n<title>404</title>", "a web page", "download"),
    "l.csv": (b'<?xml version="1.0"?><Error/>', "a web page or XML", "download"),
    "m.parquet": (b"<html><body>Not found", "a web page", "download"),
    "n.csv": (b'{"text": "a"}\n{"text": "b"}\n', "contains JSON", ".jsonl"),
    "o.csv": (b'[{"text": "a"}]\n', "contains JSON", ".json"),
    "p.jsonl": (b'[{"text": "a"}, {"text": "b"}]\n', "a JSON list", "rename it to .json"),
    "q.jsonl": (b'{\n "text": "a"\n}\n', "Invalid JSON", "each object on one line"),
    "r2.json": (b'{"text": "a"}{"text": "b"}', "Invalid JSON: Extra data", "jq -c ."),
    "r3.json": (b'{\n"text": "a"\n}\n{\n"text": "b"\n}', "Invalid JSON: Extra data", "jq -c ."),
    "s2.json": (
        b'{"instruction": "a", "output": "b", "tags": [{"text": "x"}]}',
        "neither",
        ".jsonl",
    ),
    "s.json": (b'{"messages": [{"role": "user", "content": "a"}]}', "neither a list", ".jsonl"),
    "t.txt": (b"a text\0\0\0\0", "null bytes", "damaged"),
    "u.jsonl.xz": (lzma.compress(ROW)[:-8], "ended before", "damaged"),
    "v.jsonl.bz2": (ROW, "Invalid data stream", "match its extension"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_content_that_does_not_match_the_name_is_recognized(name: str, tmp_path: Path) -> None:
    content, what, fix = CONTENTS[name]
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert what in error.what
    assert fix in str(error.fix)
    assert str(error.where).startswith(str(tmp_path / name))


def test_a_file_is_read_after_following_the_fix(tmp_path: Path) -> None:
    for name, renamed in (("a.jsonl", "a.jsonl.gz"), ("e.csv", "e.parquet"),
                          ("n.csv", "n.jsonl"), ("o.csv", "o.json"), ("p.jsonl", "p.json"),
                          ("b.jsonl", "b.jsonl.bz2"), ("s.json", "s.jsonl")):  # fmt: skip
        (tmp_path / renamed).write_bytes(CONTENTS[name][0])
        assert list(read_rows(tmp_path / renamed))
    for name in ("d.jsonl.gz", "d.jsonl.xz"):
        (tmp_path / name).write_bytes(CONTENTS[name][0])
        command = str(refused(tmp_path / name).fix).partition("new file: ")[2]
        subprocess.run(command, shell=True, check=True)
        assert list(read_rows(tmp_path / "once-d.jsonl.gz"))


def test_the_fix_for_a_file_that_is_compressed_twice_keeps_braces_in_its_name(
    tmp_path: Path,
) -> None:
    path = tmp_path / "part-{0}-{all}.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.compress(ROW)))
    fix = str(refused(path).fix)
    assert f"'{path}' > " in fix
    assert "once-part-{0}-{all}.jsonl.gz" in fix


def test_a_json_file_may_have_an_object_per_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf\n" + ROW + b'\n{"text": "b"}\n')
    where = f"{tmp_path / 'a.json'}:"
    assert list(read_rows(tmp_path / "a.json")) == [
        ({"text": "a"}, f"{where}2"),
        ({"text": "b"}, f"{where}4"),
    ]
    (tmp_path / "a.json").write_bytes(ROW + b'{"text":')
    error = refused(tmp_path / "a.json")
    assert error.where == f"{where}2"
    assert "each line" in str(error.fix)


def test_a_note_names_other_lists_in_a_json_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text('{"data": [{"text": "a"}], "more": [{"text": "b"}], "n": [1]}')
    assert [row for row, _ in read_rows(tmp_path / "a.json")] == [{"text": "a"}]
    assert "not read: 'more'" in "".join(capsys.readouterr())


def test_text_that_begins_like_another_format_is_read_as_text(tmp_path: Path) -> None:
    texts = ["PAR1 is a gene", "PK is a company", "BZh9 is none", "<html> begins a page", "%PDF"]
    for text in texts:
        (tmp_path / "a.txt").write_text(text)
        assert [row["text"] for row, _ in read_rows(tmp_path / "a.txt")] == [text]


def test_pipes_devices_and_folders_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe.jsonl", "zero.jsonl"):
        error = refused(tmp_path / name)
        assert "a pipe, or a device" in error.what
        with pytest.raises(DataError, match="a pipe, or a device"):
            _content(tmp_path, "prompts.path", name)
    with pytest.raises(DataError, match="a folder"):
        list(read_rows(tmp_path / "folder.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(ROW)
    assert [file.name for file in find_files("*.jsonl", tmp_path)] == ["a.jsonl"]


@pytest.mark.parametrize("name", ["a" * 5000, "~no-such-user/a.txt", "nul\0.txt", "loop", "no/a"])
def test_an_unusable_path_is_one_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StillhouseError):
        find_files(name, tmp_path)


def test_a_name_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "wb") as file:
        file.write(ROW)
    with pytest.raises(DataError, match="name is not UTF-8"):
        list(read_texts(TextFile(path="*.jsonl"), tmp_path))


def test_hidden_files_in_a_folder_are_skipped(tmp_path: Path) -> None:
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "b/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ROW)
    found = [str(file.relative_to(tmp_path)) for file in find_files(".", tmp_path)]
    assert found == ["a.jsonl", "b/c.jsonl"]
    assert len(find_files("._a.jsonl", tmp_path)) == 1


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    """With two links back to their own folder, a file has more paths than a run could list."""
    for name in ("data/a.jsonl", "data/b/c.jsonl", "data/.d/e.jsonl", "far/f.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(ROW)
    (tmp_path / "data" / "far").symlink_to(tmp_path / "far")
    for name in ("up", "around"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "data")
    expected = ["data/a.jsonl", "data/b/c.jsonl", "data/far/f.jsonl"]
    for pattern in ("data/**/*.jsonl", "**/data/**/*.jsonl", "data/**", "data"):
        found = [str(file.relative_to(tmp_path)) for file in find_files(pattern, tmp_path)]
        assert found == expected
    assert len(find_files("data/*/*.jsonl", tmp_path)) == 4, (
        "a path that the pattern matches is never skipped"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "*.jsonl", "**/*.jsonl", "."])
def test_a_broken_link_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(ROW)
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "annex" / "a.jsonl")
    with pytest.raises(DataError, match=r"is a link to .*annex/a\.jsonl, which does not exist"):
        find_files(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("https://example.org/a.jsonl", "download the file"),
        ("hf://datasets/me/mine/a.jsonl", "kind: hub, dataset: ID"),
        ("$HOME/a.jsonl", "without variables"),
        ("{a,b}.jsonl", "braces are not expanded"),
    ],
)
def test_urls_variables_and_braces_are_rejected_with_a_fix(
    name: str, fix: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROW)
    with pytest.raises(DataError) as error:
        find_files(name, tmp_path)
    assert fix in str(error.value.fix)


def test_markdown_is_read_as_text_only_if_it_is_named(tmp_path: Path) -> None:
    for name in ("README.md", "a.markdown", "a.rst", "a.text", "a.md.gz"):
        assert format_of(Path(name)) == "text"
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match="has no known file"):
        find_files(".", tmp_path)
