"""A text with several labels counts as unlabeled; many such texts are an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from stillhouse.errors import DataError

from .test_11_label_column import golds, prepared


def write(path: Path, rows: Sequence[tuple[str, str | None]]) -> Path:
    lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    path.write_text("".join(lines))
    return path


def test_many_texts_with_several_labels_are_rejected(tmp_path: Path) -> None:
    rows = [(f"text {n}", label) for n in range(60) for label in ("billing", "login")]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="60 of 60 texts have several labels") as caught:
        prepared(path)
    assert f"'text 0' is 'billing' ({path}:1) and 'login' ({path}:2)" in caught.value.what


def test_a_few_texts_with_several_labels_count_as_unlabeled(tmp_path: Path) -> None:
    rows = [(f"text {n}", ["billing", "login"][n % 2]) for n in range(60)]
    # The last row repeats the first text in capitals and with an additional space.
    texts = prepared(write(tmp_path / "a.jsonl", [*rows, ("TEXT  0", "login")]))
    assert golds(texts)["text 0"] is None
    assert golds(texts)["text 1"] == "login"
    assert texts.repeated == 1
    assert "1 of 60 texts have several labels" in texts.notes[0]


def test_a_repeated_text_is_used_once_with_its_only_label(tmp_path: Path) -> None:
    rows: list[tuple[str, str | None]] = [("text 0", None)]
    rows += [(f"text {n}", ["billing", "login"][n % 2]) for n in range(60)]
    texts = prepared(write(tmp_path / "a.jsonl", rows))
    assert golds(texts)["text 0"] == "billing"
    assert texts.repeated == 1
    assert texts.notes == ()
