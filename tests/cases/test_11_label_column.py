"""A value in a label column becomes a label, an unknown label, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.classify.task_texts import Texts, prepare_texts
from stillhouse.errors import DataError

TEXTS = [f"text {n}" for n in range(40)]


def prepared(path: Path) -> Texts:
    recipe = ClassifyRecipe.model_validate(
        {
            "name": "x",
            "task": {"kind": "classify"},
            "teacher": {"model": "m"},
            "student": {"start": "truncated", "layers": 1},
            "data": {"texts": [{"path": path.name, "label": "label"}]},
        }
    )
    return prepare_texts(recipe, path.parent)


def golds(texts: Texts) -> dict[str, str | None]:
    return {row.text: row.gold for row in texts.all}


def write(path: Path, labels: list[Any]) -> Path:
    rows = ({"text": t, "label": label} for t, label in zip(TEXTS, labels, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_ids_of_a_class_label_column_are_read_as_names(tmp_path: Path) -> None:
    path = tmp_path / "names.parquet"
    names = Features({"text": Value("string"), "label": ClassLabel(names=["World", "Sports"])})
    ids = [n % 2 for n in range(39)] + [-1]
    Dataset.from_dict({"text": TEXTS, "label": ids}, features=names).to_parquet(path)
    texts = prepared(path)
    assert texts.labels == {"Sports": "Sports", "World": "World"}
    found = golds(texts)
    assert [found[t] for t in (TEXTS[0], TEXTS[1], TEXTS[39])] == ["World", "Sports", None]


def test_nan_is_an_empty_cell_and_whole_numbers_have_no_fraction(tmp_path: Path) -> None:
    labels = [float("nan") if n % 5 == 0 else float(n % 2) for n in range(40)]
    parquet = tmp_path / "nan.parquet"
    pq.write_table(pa.table({"text": TEXTS, "label": labels}), parquet)
    for path in (parquet, write(tmp_path / "nan.jsonl", labels)):
        texts = prepared(path)
        assert list(texts.labels) == ["0", "1"]
        assert golds(texts)[TEXTS[5]] is None
        assert "bare numbers" in texts.notes[0]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (["red", "blue"], "a list, not a name"),
        (["red"], "a list, not a name"),
        ('["red", "blue"]', "a list, not a name"),
        ("['red', 'blue']", "a list, not a name"),
        ({"name": "red"}, "of type dict"),
        (0.5, "the number 0.5"),
        (float("inf"), "the number inf"),
    ],
)
def test_values_that_are_not_labels_are_rejected_with_their_line(
    label: Any, said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", ["red", label, *["blue"] * 38])
    with pytest.raises(DataError, match=said) as caught:
        prepared(path)
    assert caught.value.where == f"{path}:2"


def test_truth_values_are_noted_but_words_are_not(tmp_path: Path) -> None:
    texts = prepared(write(tmp_path / "a.jsonl", [["red", "blue"][n % 2] for n in range(40)]))
    assert texts.notes == ()
    texts = prepared(write(tmp_path / "b.jsonl", [n % 2 == 0 for n in range(40)]))
    assert "truth values" in texts.notes[0]


def test_an_id_without_a_name_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "names.parquet"
    names = Features({"text": Value("string"), "label": ClassLabel(names=["World", "Sports"])})
    Dataset.from_dict({"text": TEXTS, "label": [0] * 40}, features=names).to_parquet(path)
    table = pq.read_table(path)
    ids = pa.array([0, 7] + [0] * 38, table.schema.field("label").type)
    pq.write_table(table.set_column(1, "label", ids), path)
    with pytest.raises(DataError, match="defines only classes 0 to 1") as caught:
        prepared(path)
    assert caught.value.where == f"{path} row 1"


def test_labels_that_look_missing_or_joined_are_noted(tmp_path: Path) -> None:
    names = ["red", "blue", "NA", "red; blue"]
    missing, joined = prepared(write(tmp_path / "a.jsonl", names * 10)).notes
    assert "'NA' is read as a label" in missing
    assert "'red; blue' consists of other labels" in joined
    assert prepared(write(tmp_path / "b.jsonl", ["[red]", "N"] * 20)).notes == ()
