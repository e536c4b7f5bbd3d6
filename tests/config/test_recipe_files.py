"""A file that is not a valid recipe is one error with a location, and never a traceback."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from stillhouse.config.load_recipe import load_recipe, parse_recipe
from stillhouse.config.recipe_yaml import LARGEST_FILE
from stillhouse.errors import RecipeError

SMALLEST = """\
name: small
teacher: {model: teacher}
data: {sources: [{kind: text, path: a.txt}]}
student: {start: random}
"""
AT_LINE_5 = "line 5"


def bomb() -> str:
    """A kilobyte of YAML whose aliases expand to more than 9¹² values."""
    levels = "".join(
        f"  l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]\n" for level in range(1, 13)
    )
    return f"x:\n  l0: &l0 [{', '.join('x' * 9)}]\n{levels}"


def refused(path: Path | str, overrides: list[str] | None = None) -> str:
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides or [])
    assert time.process_time() - started < 2
    text = str(caught.value)
    assert text.isprintable() or "\n" in text
    assert len(text) < 10_000
    return text


WRONG = {
    "an alias that holds itself": ("x: &a [*a]", "refers to itself", AT_LINE_5),
    "a mapping that holds itself": ("x: &a {b: *a}", "refers to itself", AT_LINE_5),
    "an alias of nothing": ("x: *a", "the anchor &a is not defined", AT_LINE_5),
    "900 brackets": (f"x: {'[' * 900}{']' * 900}", "nested more than", AT_LINE_5),
    "100,000 brackets": (f"x: {'[' * 100_000}", "nested more than", AT_LINE_5),
    "100,000 braces": (f"x: {'{' * 100_000}", "nested more than", AT_LINE_5),
    "5,000 braces with keys": (f"x: {'{a: ' * 5000}", "nested more than", AT_LINE_5),
    "100,000 dashes": (f"x:\n {'- ' * 100_000}", "nested more than", "line 6"),
    "NUL": ("x: a\0b", "the character U+0000", AT_LINE_5),
    "an escape character": ("x: \x1b[31m", "the character U+001B", AT_LINE_5),
    "half of a surrogate pair": ('folder: "\\ud800"', "not valid YAML", AT_LINE_5),
    "a key given twice": ("seed: 1\nseed: 2", "`seed` is given twice", "lines 5 and 6"),
    "twice, in quotes too": ('seed: 1\n"seed": 2', "`seed` is given twice", "lines 5 and 6"),
    "twice in a list": ("x: [{a: 1, a: 2}]", "`a` is given twice", "lines 5 and 5"),
    "a Python object": ("x: !!python/object/apply:os.system [ls]", "the tag", AT_LINE_5),
    "a tag of one's own": ("x: !env HOME", "the tag !env", AT_LINE_5),
    "a number by a tag": ("seed: !!int 3", "the tag", AT_LINE_5),
    "two documents": (f"---\n{SMALLEST}", "a second document begins", AT_LINE_5),
    "a tab": ("train:\n\tepochs: 1", "not valid YAML", "line 6"),
    "a list as a key": ("? [a]\n: 1", "a key is empty, a list or a mapping", AT_LINE_5),
    "a merge of a number": ("train: {<<: 3}", "merges a value that is not a mapping", AT_LINE_5),
    "an anchor bomb": (bomb(), "more than 50,000 values", "line 10"),
    "many values": (f"x: [{'1,' * 60_000}]", "more than 50,000 values", AT_LINE_5),
    "a list as a kind": ("task: {kind: [a]}", "unknown kind of task", AT_LINE_5),
    "a mapping as a kind": ("task: {kind: {a: b}}", "unknown kind of task", AT_LINE_5),
    "a list as a task": ("task: [a]", "`task` needs the key `kind`", AT_LINE_5),
    "an integer of 5,000 digits": (f"seed: {'9' * 5000}", "5,000 digits", AT_LINE_5),
    "an integer of 390 digits": (f"seed: {'9' * 390}", "more than 80 digits", AT_LINE_5),
    "a size beyond all": (f"train: {{max_steps: 1{'0' * 30}}}", "`train.max_steps`", AT_LINE_5),
    "a long text for a number": (f"seed: {'x' * 500_000}", "`seed`", AT_LINE_5),
    "a long key": (f"{'k' * 900}: 1", "unknown key", AT_LINE_5),
    "keys that would color a terminal": ('"\\e[31m": 1', r"unknown key `\x1b[31m`", AT_LINE_5),
    "a path with NUL": ('folder: "a\\0b"', "cannot contain the character NUL", AT_LINE_5),
    "a long path": (f"folder: {'a' * 300}", "the path is too long", AT_LINE_5),
    "a deep path": (f"folder: {'a/' * 3000}", "the path is too long", AT_LINE_5),
    "nobody's home": ("folder: ~nobody-here/x", "no home folder ~nobody-here", AT_LINE_5),
    "a name that is too long": ("name2: x\n", "unknown key `name2`", AT_LINE_5),
}


@pytest.mark.parametrize(("text", "what", "where"), WRONG.values(), ids=WRONG.keys())
def test_text_that_is_not_a_recipe_is_rejected_with_its_line(
    tmp_path: Path, text: str, what: str, where: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"{SMALLEST}{text}\n")
    message = refused(path)
    assert what in message
    assert f"{path}, {where}" in message


@pytest.mark.parametrize(
    "url", ["http://h:99999/v1", "http://h:x", "http://[::1", "h/v1", "ftp://h"]
)
def test_a_url_that_no_request_can_be_sent_to_is_rejected(url: str) -> None:
    task = {"name": "a", "task": {"kind": "generate"}, "data": {"texts": [{"path": "t"}]}}
    student = {"start": "pretrained", "model": "m"}
    teacher = {"api": {"base_url": url, "model": "m"}}
    with pytest.raises(RecipeError, match=r"`teacher.api`: (base_url must be|.*IPv6)"):
        parse_recipe({**task, "student": student, "teacher": teacher})


def test_the_error_for_an_invalid_url_does_not_show_its_password() -> None:
    server = {"base_url": "http://user:hunter2@h:99999/v1", "model": "m"}
    raw = {"name": "a", "signals": {"encoding": {"kind": "top_k"}, "server": server}}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    assert "base_url must be" in str(caught.value)
    assert "hunter2" not in str(caught.value)


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.yaml")
    return tmp_path / "pipe.yaml"


def test_pipes_devices_and_folders_are_not_read(pipe: Path) -> None:
    assert "not a regular file" in refused(pipe)
    assert "not a regular file" in refused("/dev/zero")
    assert "is a folder" in refused(pipe.parent)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x/" * 3000, "~nobody-here/r.yaml", ""])
def test_impossible_paths_are_rejected(name: str) -> None:
    refused(name)


def test_a_path_through_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(tmp_path / "file" / "r.yaml")


CONTENTS = {
    "nothing": (b"", "is empty"),
    "comments": (b"# name: small\n", "is empty"),
    "a list": (b"- 1\n", "not a mapping"),
    "a number": (b"1\n", "not a mapping"),
    "latin-1": (SMALLEST.encode() + "# é\n".encode("latin-1"), "not UTF-8 text: byte 0xe9"),
    "UTF-16 without a mark": (SMALLEST.encode("utf-16-le"), "the character U+0000"),
    "UTF-32": (SMALLEST.encode("utf-32"), "the character U+0000"),
    "half a pair in UTF-16": (b"\xff\xfea\x00\x00", "not UTF-8 text"),
    "a program": (b"\x7fELF\x02\x01\x01\x00\x00", "the character U+007F"),
    "a gzip file": (b"\x1f\x8b\x08\x00\x00\x00", "not UTF-8 text"),
    "a large file": (b"#" * (LARGEST_FILE + 1), "has 1,000,001 bytes"),
    "a large list": (b"x: [" + b"a," * 450_000 + b"]", "more than 50,000 values"),
    "a large indent": (b"x:\n" + b" " * 900_000 + b"- 1\n", "`name` is missing"),
    "a large comment": (b"#" * 900_000, "is empty"),
}


@pytest.mark.parametrize(("content", "what"), CONTENTS.values(), ids=CONTENTS.keys())
def test_files_that_are_not_a_recipe_are_rejected(
    tmp_path: Path, content: bytes, what: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    message = refused(path)
    assert what in message
    assert str(path) in message


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(10**12)
    assert "1,000,000,000,000 bytes" in refused(tmp_path / "r.yaml")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_byte_order_marks_determine_the_encoding_of_a_recipe(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "r.yaml").write_bytes((mark + SMALLEST).replace("\n", "\r\n").encode(encoding))
    assert load_recipe(tmp_path / "r.yaml").name == "small"


def test_a_few_aliases_and_merges_are_expanded(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        SMALLEST
        + "train: &fit {epochs: 2, batch_size: 4}\n"
        + "evaluate: {prompts: &p [a, b]}\n"
        + "objective:\n  terms:\n    - &t {divergence: jsd, weight: 0.5}\n"
        + "    - {<<: *t, divergence: reverse_kl}\n"
    )
    recipe: Any = load_recipe(path, ["objective.terms.0.weight=0.25"])
    terms = [(term.divergence, term.weight) for term in recipe.objective.terms]
    assert terms == [("jsd", 0.25), ("reverse_kl", 0.5)]


# --- dictionaries and overrides --------------------------------------------------------------


def test_dictionaries_that_are_not_a_recipe_are_rejected() -> None:
    base: dict[str, Any] = {"name": "a", "student": {"start": "random"}}
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for wrong in (loop, deep, {1: 2}, {("a",): 1}, {None: 1}, object(), b"x", {"a\ud800": 1}):
        with pytest.raises(RecipeError):
            parse_recipe({**base, "train": wrong})
    with pytest.raises(RecipeError, match="half of a surrogate pair"):
        parse_recipe({**base, "folder": "\ud800"})


@pytest.mark.parametrize(
    "override",
    [
        "seed=1:30",
        "seed=on",
        "seed=*a",
        "seed=!!python/name:os.system x",
        "seed=[",
        "seed=\ud800",
        "seed=a\0b",
        "train={epochs: .inf}",
        "data.sources.-1.path=x",
        "data.sources.².path=x",
        f"data.sources.{'9' * 5000}.path=x",
        f"train.{'a.' * 3000}b=1",
        f"{'a' * 5000}=1",
        "=1",
        "seed",
        ".=1",
    ],
)
def test_invalid_overrides_are_rejected(tmp_path: Path, override: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(SMALLEST)
    assert "--set" in refused(path, [override])
