"""Which rows of a file are read, and how they are divided into training and test texts."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from stillhouse.classify.classify_config import ClassifyRecipe, ClassifyTask
from stillhouse.classify.task_texts import Texts, prepare_texts, task_labels
from stillhouse.errors import DataError, RecipeError
from stillhouse.tasks.labeled_texts import LabeledText, divide_texts, read_texts
from stillhouse.tasks.task_texts_config import TextFile


def rows_of(path: Path, **more: Any) -> list[str]:
    return [row.text for row in read_texts(TextFile(path=path.name, **more), path.parent)]


def test_a_sample_is_drawn_from_the_complete_file_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "sorted.txt"
    lines = [f"{topic} number {number}" for topic in ("cats", "soups") for number in range(50)]
    path.write_text("\n".join(lines))
    drawn = rows_of(path, sample=20)
    assert rows_of(path, limit=20) == lines[:20]
    assert len(set(drawn) & set(lines)) == 20
    assert 4 <= sum(line.startswith("cats") for line in drawn) <= 16
    path.write_text("\n".join(reversed(lines)))
    assert rows_of(path, sample=20) == drawn


def test_adding_a_row_replaces_at_most_one_row_of_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    lines = [f"message {number}" for number in range(100)]
    path.write_text("\n".join(lines))
    before = set(rows_of(path, sample=30))
    path.write_text("\n".join(["a new one", *lines]))
    assert len(before - set(rows_of(path, sample=30))) <= 1


def test_an_empty_cell_is_an_unknown_label(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text,label\none,a\ntwo,\nthree, b \n")
    file = TextFile(path="texts.csv", label="label")
    assert [row.gold for row in read_texts(file, tmp_path)] == ["a", None, "b"]
    with pytest.raises(DataError, match="no label under 'topic'"):
        list(read_texts(TextFile(path="texts.csv", label="topic"), tmp_path))


def test_an_unclosed_quote_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text('text\none\n"two\nlines"\n"three\nfour\nfive\n')
    with pytest.raises(DataError, match="not valid CSV") as caught:
        rows_of(tmp_path / "texts.csv")
    assert str(caught.value.where).endswith("texts.csv:5")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["yes", True], 'write it in quotes, such as "yes"'),
        ({"a": "the a", False: "b"}, "a label is false"),
        ({"a": "the a", "b": True}, "a label is true"),
        (["a", 1.5], "the label 1.5 is not text"),
    ],
)
def test_a_label_that_is_not_text_is_rejected(labels: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ClassifyTask.model_validate({"kind": "classify", "labels": labels})


def test_integers_can_be_labels() -> None:
    task = ClassifyTask.model_validate({"kind": "classify", "labels": [1, 2]})
    assert task.labels == {"1": "1", "2": "2"}
    task = ClassifyTask.model_validate({"kind": "classify", "labels": {1: "bad", 2: "good"}})
    assert task.labels == {"1": "bad", "2": "good"}


@pytest.mark.parametrize("labels", [None, ["0", "1"], ["0.0", "1.0"]])
def test_integer_labels_that_are_written_as_floats_are_recognized(
    tmp_path: Path, labels: list[str] | None
) -> None:
    """pandas writes integers with empty cells as 1.0, in CSV and in Parquet."""
    (tmp_path / "texts.csv").write_text(
        "text,label\n" + "".join(f"text {n},{n % 2}.0\n" for n in range(40)) + "more,\n"
    )
    rows = [{"text": f"test {n}", "label": float(n % 2)} for n in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    task = {} if labels is None else {"labels": labels}
    found = prepared(tmp_path / "texts.csv", test="test.parquet", **task)
    assert list(found.labels) == (labels or ["0", "1"])
    assert {row.gold for row in found.test} == set(found.labels)
    assert {row.gold for row in found.train} - {None} == set(found.labels)


def test_version_numbers_are_not_integers(tmp_path: Path) -> None:
    rows = "".join(f"text {n},{['2.0', '2.1'][n % 2]}\n" for n in range(40))
    (tmp_path / "texts.csv").write_text(f"text,label\n{rows}")
    assert list(prepared(tmp_path / "texts.csv").labels) == ["2.0", "2.1"]


@pytest.mark.parametrize("own_tests", [False, True])
def test_an_example_in_the_prompt_is_excluded_from_the_test_texts(own_tests: bool) -> None:
    given = [LabeledText(f"text {number}") for number in range(40)]
    tests = [LabeledText(f"test {number}") for number in range(10)] if own_tests else []
    _, before, _ = divide_texts(given, tests, 0.25, seed=1)
    train, test, _ = divide_texts(given, tests, 0.25, seed=1, examples=[before[0].text.upper()])
    assert test == before[1:]
    assert (before[0] in train) is not own_tests
    assert len({row.text for row in (*train, *test)}) == len(train) + len(test)


def test_a_test_text_is_used_once_and_never_trained_on() -> None:
    tests = [LabeledText("One  text"), LabeledText("one text"), LabeledText("two")]
    given = [LabeledText("ONE TEXT"), LabeledText("three"), LabeledText("two")]
    train, test, repeated = divide_texts(given, tests, 0.5, seed=0)
    assert [row.text for row in test] == ["One  text", "two"]
    assert [row.text for row in train] == ["three"]
    assert repeated == 3


def prepared(path: Path, *, test: str | None = None, **task: Any) -> Texts:
    tests = [] if test is None else [{"path": test, "label": "label"}]
    recipe = ClassifyRecipe.model_validate(
        {
            "name": "x",
            "task": {"kind": "classify", **task},
            "teacher": {"model": "m"},
            "student": {"start": "truncated", "layers": 1},
            "data": {"texts": [{"path": path.name, "label": "label"}], "test": tests},
        }
    )
    return prepare_texts(recipe, path.parent)


def test_a_label_in_another_unicode_form_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    labels = ["café", "thé"]
    rows = [(f"text {n}", unicodedata.normalize("NFD", labels[n % 2])) for n in range(40)]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    assert {row.gold for row in prepared(path, labels=labels).all} == set(labels)
    assert set(prepared(path).labels) == set(labels)


def test_labels_that_differ_in_case_or_width_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    for one, other in (("spam", "Spam"), ("ＡＢＣ", "abc"), ("STRASSE", "Straße")):
        rows = [f"text {n},{[one, other][n % 2]}\n" for n in range(40)]
        path.write_text("text,label\n" + "".join(rows))
        with pytest.raises(RecipeError, match="have the same phrase") as error:
            prepared(path)
        assert "a phrase of its own in task.labels" in (error.value.fix or "")
        assert set(prepared(path, labels={one: "the first", other: "the second"}).labels) == {
            one,
            other,
        }


def test_a_label_column_that_contains_ids_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("text,label\n" + "".join(f"text {n},id{n}\n" for n in range(40)))
    assert "40 labeled texts have 40 labels" in prepared(path).notes[-1]


def test_texts_that_differ_only_in_case_or_unicode_form_are_used_once(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    twins = [("café", "cafe\u0301"), ("ＡＢＣ", "abc"), ("a\u200bb", "ab"), ("วัน", "วัน")]
    others = [("आया", "आयी"), ("ไม่", "ไม้")]
    texts = [f"text {n}" for n in range(40)]
    texts += [text for pair in twins + others for text in pair]
    rows = [f"{text},{['x', 'y'][number % 4 // 2]}\n" for number, text in enumerate(texts)]
    path.write_text("text,label\n" + "".join(rows))
    found = prepared(path)
    assert found.repeated == len(twins)
    assert {text for pair in others for text in pair} <= {row.text for row in found.all}


def labels_in(path: Path, content: str) -> list[str]:
    path.write_text(content)
    task = ClassifyTask(kind="classify", labels_path=path.name)
    return list(task_labels(task, path.parent, []))


def test_labels_path_can_be_a_text_file_or_a_table(tmp_path: Path) -> None:
    assert labels_in(tmp_path / "labels.txt", "card\n fees \n") == ["card", "fees"]
    assert labels_in(tmp_path / "labels.csv", "label,more\ncard,x\nfees,y\n") == ["card", "fees"]
    assert labels_in(tmp_path / "labels.jsonl", '{"label": 1}\n{"label": 2}\n') == ["1", "2"]


def test_a_labels_path_that_matches_several_files_is_an_error(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("card\nfees\n")
    task = ClassifyTask(kind="classify", labels_path="*.txt")
    with pytest.raises(RecipeError, match="matches 2 files") as caught:
        task_labels(task, tmp_path, [])
    assert caught.value.where == "task.labels_path"


def test_the_error_for_a_table_of_labels_without_a_label_column_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no label under 'label'; its keys are name") as caught:
        labels_in(tmp_path / "labels.csv", "name\ncard\nfees\n")
    assert "labels.csv:2" in str(caught.value.where)
    assert "name the column or key of the labels 'label'" in str(caught.value.fix)
    with pytest.raises(DataError, match="the label is empty"):
        labels_in(tmp_path / "labels.csv", "label,more\ncard,x\n,y\n")
    with pytest.raises(DataError, match="the label is a list, not a name"):
        labels_in(tmp_path / "labels.jsonl", '{"label": ["card"]}\n')
