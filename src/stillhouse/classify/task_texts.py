"""Reads the texts of a task, drops repeated ones, and splits them into parts."""

from __future__ import annotations

import difflib
import hashlib
import heapq
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.classify.classify_config import (
    ClassifyRecipe,
    ClassifyTask,
    TextFile,
    check_labels,
    phrase_of,
)
from stillhouse.data.row_reader import find_files, not_empty, read_rows
from stillhouse.errors import DataError, RecipeError
from stillhouse.runfolder import sha, write_atomically

Part = Literal["train", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "calibration", "test")
LABELS = "labels.json"
FEWEST = 4
"""The fewest texts in a part to train or measure on."""

UNKNOWN = -1
"""The index of an unknown reference label."""


@dataclass(frozen=True)
class LabelledText:
    """gold: the reference label or answer, None if unknown. where: file and row."""

    text: str
    gold: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Texts:
    """labels: each with its phrase, in order. repeated: texts that were dropped as repeated."""

    labels: dict[str, str]
    train: list[LabelledText]
    calibration: list[LabelledText]
    test: list[LabelledText]
    repeated: int = 0

    def part(self, name: Part) -> list[LabelledText]:
        return {"train": self.train, "calibration": self.calibration, "test": self.test}[name]

    @property
    def all(self) -> list[LabelledText]:
        return [*self.train, *self.calibration, *self.test]

    def save(self, folder: Path) -> None:
        facts = {"labels": self.labels, "repeated": self.repeated}
        write_atomically(folder / LABELS, json.dumps(facts, ensure_ascii=False, indent=1))
        for name in PARTS:
            rows = (json.dumps(asdict(row), ensure_ascii=False) for row in self.part(name))
            write_atomically(folder / f"{name}.jsonl", "".join(f"{row}\n" for row in rows))

    @classmethod
    def load(cls, folder: Path) -> Texts:
        facts = json.loads((folder / LABELS).read_text(encoding="utf-8"))
        parts = {}
        for name in PARTS:
            # Not splitlines: a text may hold one of the other characters that end lines.
            lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
            parts[name] = [LabelledText(**json.loads(line)) for line in lines if line]
        return cls(facts["labels"], repeated=facts["repeated"], **parts)


def gold_ids(texts: Sequence[LabelledText], labels: Sequence[str]) -> list[int] | None:
    """Index of each text's reference label, UNKNOWN if it has none; None if fewer than FEWEST have
    one."""
    if sum(row.gold is not None for row in texts) < FEWEST:
        return None
    index = {label: number for number, label in enumerate(labels)}
    return [UNKNOWN if row.gold is None else index[row.gold] for row in texts]


def prepare_texts(recipe: ClassifyRecipe, base: Path) -> Texts:
    """Reads a recipe's texts and splits them.

    Raises DataError: unreadable files, empty texts, too few texts, a label that is not in the list;
    RecipeError: no labels, or labels that cannot be distinguished.
    """
    section = recipe.data
    given, tests = read_files(section.texts, base), read_files(section.test, base)
    labels = task_labels(recipe.task, base, [*given, *tests])
    for row in (*given, *tests):
        _check_gold(row, labels)
    train, test, repeated = divide_texts(given, tests, section.test_share, recipe.seed)
    apart = round(section.calibration_share * len(train))
    texts = Texts(labels, train[apart:], train[:apart], test, repeated)
    require_enough({name: texts.part(name) for name in PARTS})
    return texts


def divide_texts(
    given: Sequence[LabelledText], tests: Sequence[LabelledText], test_share: float, seed: int
) -> tuple[list[LabelledText], list[LabelledText], int]:
    """Training texts in random order, and test texts; none is repeated. Also how many were.

    The content of a text and the seed decide its part, so that the order of the files and other
    texts hardly matter. test_share: of `given`, if there are no test texts.
    """
    seen: set[str] = set()
    kept_tests = list(_unrepeated(tests, seen))
    kept = sorted(_unrepeated(given, seen), key=lambda row: _place(row, str(seed)))
    repeated = len(given) + len(tests) - len(kept) - len(kept_tests)
    if not kept_tests:
        apart = round(test_share * len(kept))
        kept_tests, kept = kept[:apart], kept[apart:]
    return kept, kept_tests, repeated


def require_enough(parts: Mapping[str, Sequence[LabelledText]]) -> None:
    """Raises DataError for a part with too few texts."""
    for name, rows in parts.items():
        if len(rows) < FEWEST:
            raise DataError(
                f"the {name} part has {len(rows)} texts, and {FEWEST} are the fewest",
                where="data",
                fix="give more texts, or change the shares of the parts in `data`",
            )


def task_labels(task: ClassifyTask, base: Path, rows: Sequence[LabelledText]) -> dict[str, str]:
    """Each label with its phrase. Raises RecipeError, DataError."""
    if task.labels is not None:
        return task.labels
    if task.labels_path is not None:
        path = find_files(task.labels_path, base)[0]
        lines = read_rows(path, format="text", text_key="label")
        names, where = [line["label"] for line, _ in lines], str(path)
    else:
        names, where = sorted({row.gold for row in rows if row.gold is not None}), "task.labels"
        if not names:
            raise RecipeError(
                "the task has no labels",
                where=where,
                fix="list them in task.labels, name a file in task.labels_path, or name the column "
                "that holds them: data.texts.0.label",
            )
    labels = {name: phrase_of(name) for name in names}
    try:
        check_labels(labels)
    except ValueError as error:
        raise RecipeError(str(error), where=where, fix="list them in task.labels") from None
    for example in task.examples:
        if example.label not in labels:
            raise RecipeError(
                f"an example has the label {example.label!r}, which is not among the labels",
                where="task.examples",
                fix=_nearest(example.label, labels),
            )
    return labels


def _check_gold(row: LabelledText, labels: Mapping[str, str]) -> None:
    if row.gold is not None and row.gold not in labels:
        raise DataError(
            f"the label {row.gold!r} is not in the task's list",
            where=row.where,
            fix=_nearest(row.gold, labels),
        )


def _nearest(label: str, labels: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(label, list(labels), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}labels are {', '.join(list(labels)[:12])}{' ...' if len(labels) > 12 else ''}"


def _unrepeated(rows: Sequence[LabelledText], seen: set[str]) -> Iterator[LabelledText]:
    """Rows whose text was not seen yet, ignoring case and whitespace."""
    for row in rows:
        key = " ".join(row.text.casefold().split())
        if key not in seen:
            seen.add(key)
            yield row


# --- files -----------------------------------------------------------------------------------


def files_sha256(files: Sequence[TextFile], base: Path) -> list[str]:
    return [sha(path) for file in files for path in find_files(file.path, base)]


def read_files(files: Sequence[TextFile], base: Path) -> list[LabelledText]:
    """The rows of all files. Raises DataError."""
    return [row for file in files for row in read_texts(file, base)]


def read_texts(file: TextFile, base: Path) -> Iterator[LabelledText]:
    """The rows of a file, or of all files of a folder or glob. Raises DataError."""
    found = itertools.islice(_read_all(file, base), file.limit)
    if file.sample is None:
        return found
    # By content, so that an added row does not move others.
    return iter(heapq.nsmallest(file.sample, found, key=lambda row: _place(row, "draw")))


def first_row(path: str, base: Path) -> Mapping[str, Any]:
    """All columns of the first row; of plain text, the line under `text`. Raises DataError."""
    file = find_files(path, base)[0]
    return next(not_empty(read_rows(file, text_key="text"), "The file", file))[0]


def labelled_text(row: Mapping[str, Any], file: TextFile, where: str) -> LabelledText:
    """The row's text and label, under the keys that `file` names. Raises DataError."""
    text = row.get(file.text)
    if file.text not in row or not isinstance(text, str):
        raise DataError(
            f"the row has no text under {file.text!r}; it has {', '.join(map(str, row))}",
            where=where,
            fix="name the column or key of the text: text: NAME (--text NAME of `predict`)",
        )
    if not text.strip():
        raise DataError("the text is empty", where=where, fix="remove the row")
    if file.label is None:
        return LabelledText(text, None, where)
    if file.label not in row:
        raise DataError(
            f"the row has no label under {file.label!r}; it has {', '.join(map(str, row))}",
            where=where,
            fix="name the label's column or key, or leave `label` out",
        )
    gold = row[file.label]
    if gold is None or str(gold).strip() == "":
        return LabelledText(text, None, where)
    shown = json.dumps(gold, ensure_ascii=False) if isinstance(gold, dict | list) else str(gold)
    return LabelledText(text, shown.strip(), where)


def _place(row: LabelledText, purpose: str) -> bytes:
    return hashlib.sha256(f"{purpose} {row.text}".encode("utf-8", "replace")).digest()


def _read_all(file: TextFile, base: Path) -> Iterator[LabelledText]:
    columns = [key for key in (file.text, file.label) if key is not None]
    for path in find_files(file.path, base):
        for row, where in read_rows(path, text_key=file.text, columns=columns):
            yield labelled_text(row, file, where)
