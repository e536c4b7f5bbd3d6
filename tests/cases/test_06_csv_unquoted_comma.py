"""An unquoted comma in a CSV file is an error; it must not cut off a text or shift its label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.data_config import FileSource
from stillhouse.data.sources import read_sources
from stillhouse.errors import DataError
from stillhouse.synthesis.prompts import read_prompts
from stillhouse.tasks.labeled_texts import file_texts, first_rows, read_texts
from stillhouse.tasks.task_texts_config import TextFile

# case: (the file's content, the line that is rejected, a part of the error message)
FILES = {
    "one column": ("text\nhello\nPlease write to Ann, not to Bob\n", 3, "more cells"),
    "two columns": ("text,label\nmy card is lost,card\nHello, my card is lost,card\n", 3, "more"),
    "a trailing comma": ("text,label,\nmy card is lost,card,\nHello, card,card\n", 3, "no name"),
    "a cell too few": ("text,label\nmy card is lost\n", 2, "fewer cells"),
}


@pytest.mark.parametrize("case", FILES)
def test_every_reader_rejects_a_row_that_does_not_fit_the_header(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, line, said = FILES[case]
    path = tmp_path / "a.csv"
    path.write_text(content)
    monkeypatch.chdir(tmp_path)
    readers: list[Callable[[], Any]] = [
        lambda: list(read_texts(TextFile(path="a.csv"), tmp_path)),
        lambda: list(read_prompts(path, key="text")),
        lambda: list(read_sources([FileSource(kind="file", path="a.csv")], tmp_path)),
        lambda: list(file_texts(path, "text")),
    ]
    if line == 2:
        readers.append(lambda: first_rows("a.csv", tmp_path))
    for read in readers:
        with pytest.raises(DataError, match=said) as caught:
            read()
        assert caught.value.where == f"{path}:{line}"
        assert "double quotes" in str(caught.value.fix)


def test_a_row_quoted_as_the_message_suggests_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"Hello, my card is lost",card\n')
    (row,) = read_texts(TextFile(path="a.csv", label="label"), tmp_path)
    assert (row.text, row.gold) == ("Hello, my card is lost", "card")
