"""Files that a user names: a pipe or a device is an error at once, where reading would not end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.classify.predict_labels import file_texts
from stillhouse.data.row_reader import find_files, open_text, read_rows
from stillhouse.errors import DataError, ModelError, RecipeError, RunError, StillhouseError
from stillhouse.generation.journal import Journal
from stillhouse.input_files import check_regular
from stillhouse.pruning.vocabulary_cut import _listed
from stillhouse.synthesis.filters import read_schema
from stillhouse.synthesis.prompts import read_prompts
from stillhouse.teachers.model_source import resolve_model


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Without a writer, so that opening it waits for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    return tmp_path / "pipe.jsonl"


READERS: dict[str, tuple[Callable[[Path], object], type[StillhouseError]]] = {
    "data": (lambda path: find_files(str(path), path.parent), DataError),
    "rows": (lambda path: list(read_rows(path)), DataError),
    "text": (lambda path: open_text(path).__enter__(), DataError),
    "prompts": (lambda path: list(read_prompts(path)), DataError),
    "texts": (lambda path: list(file_texts(path, "text")), DataError),
    "schema": (read_schema, DataError),
    "vocabulary": (lambda path: _listed(path, None, ()), RecipeError),  # type: ignore[arg-type]
    "journal": (Journal, RunError),
    "model": (lambda path: resolve_model(str(path), base=path.parent), ModelError),
}


@pytest.mark.parametrize(("read", "error"), READERS.values(), ids=READERS.keys())
def test_a_pipe_is_refused_by_every_reader(
    pipe: Path, read: Callable[[Path], object], error: type[StillhouseError]
) -> None:
    with pytest.raises(error, match="a pipe or a device") as caught:
        read(pipe)
    assert str(caught.value.where) == str(pipe)


def test_what_is_not_there_is_left_to_the_reader(tmp_path: Path) -> None:
    assert check_regular(tmp_path / "none") == tmp_path / "none"
    with pytest.raises(DataError, match="this is a folder"):
        check_regular(tmp_path)


def test_a_path_to_texts_that_cannot_be_is_one_error() -> None:
    with pytest.raises(RecipeError, match="the path is too long"):
        list(file_texts(Path("x" * 400), "text"))
