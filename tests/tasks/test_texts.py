"""Which rows of a file are read, and into which part they go."""

from __future__ import annotations

from pathlib import Path

from stillhouse.recipe.classify import TextFile
from stillhouse.tasks.texts import read_texts


def rows_of(path: Path, **more: int) -> list[str]:
    return [row.text for row in read_texts(TextFile(path=path.name, **more), path.parent)]


def test_a_sample_is_drawn_from_the_whole_file_whatever_its_order(tmp_path: Path) -> None:
    path = tmp_path / "sorted.txt"
    lines = [f"{topic} number {number}" for topic in ("cats", "soups") for number in range(50)]
    path.write_text("\n".join(lines))
    drawn = rows_of(path, sample=20)
    assert rows_of(path, limit=20) == lines[:20]
    assert len(set(drawn) & set(lines)) == 20
    assert 4 <= sum(line.startswith("cats") for line in drawn) <= 16
    path.write_text("\n".join(reversed(lines)))
    assert rows_of(path, sample=20) == drawn


def test_one_row_more_changes_at_most_one_of_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    lines = [f"message {number}" for number in range(100)]
    path.write_text("\n".join(lines))
    before = set(rows_of(path, sample=30))
    path.write_text("\n".join(["a new one", *lines]))
    assert len(before - set(rows_of(path, sample=30))) <= 1
