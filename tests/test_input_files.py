"""An input file that is a pipe or a device is an error, because reading it may never end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.data.data_files import open_text, regular_if_there
from stillhouse.data.file_search import find_files
from stillhouse.data.row_reader import read_rows
from stillhouse.errors import DataError, RecipeError, StillhouseError
from stillhouse.generation.journal import Journal
from stillhouse.pruning.vocabulary_cut import _listed
from stillhouse.synthesis.filters import read_schema
from stillhouse.synthesis.prompts import read_prompts
from stillhouse.tasks.labeled_texts import file_texts
from stillhouse.teachers.model_source import resolve_model


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A pipe without a writer; opening it would block forever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    return tmp_path / "pipe.jsonl"


READERS: dict[str, Callable[[Path], object]] = {
    "data": lambda path: find_files(str(path), path.parent),
    "rows": lambda path: list(read_rows(path)),
    "text": lambda path: open_text(path).__enter__(),
    "prompts": lambda path: list(read_prompts(path)),
    "texts": lambda path: list(file_texts(path, "text")),
    "schema": read_schema,
    "vocabulary": lambda path: _listed(path, None, set(), ()),  # type: ignore[arg-type]
    "journal": Journal,
    "model": lambda path: resolve_model(str(path), base=path.parent),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_every_reader_rejects_a_pipe(pipe: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(StillhouseError, match=r"(a pipe, or|or) a device") as caught:
        read(pipe)
    assert str(caught.value.where) == str(pipe)


def test_a_missing_file_is_left_to_the_reader_but_a_folder_is_not(tmp_path: Path) -> None:
    assert regular_if_there(tmp_path / "none") == tmp_path / "none"
    with pytest.raises(DataError, match="is a folder"):
        regular_if_there(tmp_path)


def test_a_path_that_is_too_long_is_one_error() -> None:
    with pytest.raises(RecipeError, match="the path is too long"):
        list(file_texts(Path("x" * 400), "text"))
