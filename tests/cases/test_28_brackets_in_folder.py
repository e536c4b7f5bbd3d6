"""Only the path in a recipe can be a pattern; the name of the recipe's folder is literal."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.data.data_config import FileSource, HubSource
from stillhouse.data.file_search import find_files
from stillhouse.data.sources import read_sources, sources_fingerprint
from stillhouse.errors import DataError
from stillhouse.tasks.labeled_texts import read_texts
from stillhouse.tasks.task_texts_config import TextFile

FOLDERS = ["v1", "support [2026]", "v[12]", "a*b", "what?"]


@pytest.mark.parametrize("path", ["part-*.jsonl", "part-1.jsonl", "**/part-?.jsonl", "."])
def test_a_recipe_reads_its_own_folder_whatever_its_name(path: str, tmp_path: Path) -> None:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-1.jsonl").write_text(f'{{"text": "of {name}"}}\n')
    for name in FOLDERS:
        base = tmp_path / name
        source = FileSource(kind="jsonl", path=path)
        assert [d.content() for d in read_sources([source], base)] == [{"text": f"of {name}"}]
        assert [row.text for row in read_texts(TextFile(path=path), base)] == [f"of {name}"]
        assert len(sources_fingerprint([source], base)) == 1


def test_an_existing_file_named_like_a_pattern_is_read(tmp_path: Path) -> None:
    for name in ("a[1].txt", "a1.txt", "set[2]/x.txt", "set2/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for pattern in ("a[1].txt", "set[2]/x.txt", "set[2]/*.txt", "set[2]"):
        (found,) = find_files(pattern, tmp_path)
        assert "[" in str(found.relative_to(tmp_path))
    assert [file.name for file in find_files("a[12].txt", tmp_path)] == ["a1.txt"]


def test_brackets_in_the_home_folder_are_literal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home [me]"
    home.mkdir()
    (home / "a.txt").write_text("x")
    monkeypatch.setenv("HOME", str(home))
    assert find_files("~/*.txt", Path("/")) == [home / "a.txt"]


def test_a_folder_that_datasets_would_read_as_a_pattern_is_rejected(tmp_path: Path) -> None:
    for name in ("v1", "v[12]"):
        (tmp_path / name / "set").mkdir(parents=True)
        (tmp_path / name / "set" / "train.jsonl").write_text(f'{{"text": "of {name}"}}\n')
    source = HubSource(kind="hub", dataset="set")
    with pytest.raises(DataError, match="as a pattern") as caught:
        list(read_sources([source], tmp_path / "v[12]"))
    assert "kind: file" in str(caught.value.fix)
    instead = FileSource(kind="file", path="set")
    (document,) = read_sources([instead], tmp_path / "v[12]")
    assert document.content() == {"text": "of v[12]"}
