"""The texts of a task: read, cleaned of repetitions, and divided into parts, once and for all."""

from __future__ import annotations

import difflib
import glob
import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.classify.classify_config import (
    ClassifyRecipe,
    ClassifyTask,
    TextFile,
    TextsRecipe,
    check_labels,
    phrase_of,
)
from stillhouse.errors import DataError, RecipeError
from stillhouse.runfolder import sha, write_atomically
from stillhouse.synthesis.prompts import csv_rows

Part = Literal["train", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "calibration", "test")
LABELS = "labels.json"
FEWEST = 4
"""Texts in a part below which nothing can be learnt or measured."""

UNKNOWN = -1
"""Stands for the index of a true label that is not known."""


@dataclass(frozen=True)
class LabelledText:
    """gold: the true label, None where it is not known. where: file and row."""

    text: str
    gold: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Texts:
    """labels: each with its phrase, in order. repeated: texts left out as seen before."""

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
    """Index of each text's true label, UNKNOWN where it has none; None where fewer than FEWEST
    have one."""
    if sum(row.gold is not None for row in texts) < FEWEST:
        return None
    index = {label: number for number, label in enumerate(labels)}
    return [UNKNOWN if row.gold is None else index[row.gold] for row in texts]


def prepare_texts(recipe: ClassifyRecipe, base: Path) -> Texts:
    """Reads a recipe's texts and divides them. A text belongs to a part by its content and the
    seed, so that neither order nor other texts move it far.

    Raises DataError: nothing readable, empty texts, too few texts, a label that is not in the
    list; RecipeError: no labels, or labels that cannot be told apart.
    """
    section = recipe.data
    given = [row for file in section.texts for row in read_texts(file, base)]
    tests = [row for file in section.test for row in read_texts(file, base)]
    labels = task_labels(recipe.task, base, [*given, *tests])
    for row in (*given, *tests):
        _check_gold(row, labels)
    seen: set[str] = set()
    kept_tests = list(unrepeated(tests, seen))
    kept = list(unrepeated(given, seen))
    repeated = len(given) + len(tests) - len(kept) - len(kept_tests)
    train, calibration, test = _divide(kept, kept_tests, section, recipe.seed)
    texts = Texts(labels, train, calibration, test, repeated)
    for name in PARTS:
        if len(texts.part(name)) < FEWEST:
            raise DataError(
                f"the {name} part has {len(texts.part(name))} texts, and {FEWEST} are the fewest",
                where="data",
                fix="give more texts, or change data.test_share and data.calibration_share",
            )
    return texts


def task_labels(task: ClassifyTask, base: Path, rows: Sequence[LabelledText]) -> dict[str, str]:
    """Each label with its phrase. Raises RecipeError, DataError."""
    if task.labels is not None:
        return task.labels
    if task.labels_path is not None:
        path = _existing(task.labels_path, base)[0]
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        names, where = [line.strip() for line in lines if line.strip()], str(path)
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


def unrepeated(rows: Sequence[LabelledText], seen: set[str]) -> Iterator[LabelledText]:
    """Rows whose text was not seen yet, whatever its case and spaces."""
    for row in rows:
        key = " ".join(row.text.casefold().split())
        if key not in seen:
            seen.add(key)
            yield row


def _divide(
    rows: list[LabelledText], tests: list[LabelledText], section: TextsRecipe, seed: int
) -> tuple[list[LabelledText], list[LabelledText], list[LabelledText]]:
    shuffled = sorted(rows, key=lambda row: place(row, str(seed)))
    if not tests:
        apart = round(section.test_share * len(shuffled))
        tests, shuffled = shuffled[:apart], shuffled[apart:]
    apart = round(section.calibration_share * len(shuffled))
    return shuffled[apart:], shuffled[:apart], tests


# --- files -----------------------------------------------------------------------------------


def files_sha256(files: Sequence[TextFile], base: Path) -> list[str]:
    return [sha(path) for file in files for path in _existing(file.path, base)]


def read_texts(file: TextFile, base: Path) -> Iterator[LabelledText]:
    """The rows of a file or of all files of a glob. Raises DataError with file and row."""
    if file.sample is None:
        return _read_all(file, base)
    # By their content, so that a row that is added moves no other one.
    drawn = heapq.nsmallest(file.sample, _read_all(file, base), key=lambda row: place(row, "draw"))
    return iter(drawn)


def first_row(file: TextFile, base: Path) -> Mapping[str, Any]:
    """All columns of the first row; of plain text, the line under file.text. Raises DataError."""
    path = _existing(file.path, base)[0]
    for row, _ in _rows(path, file, every_column=True):
        return row
    raise DataError("the file is empty", where=path, fix="give another one")


def place(row: LabelledText, purpose: str) -> bytes:
    return hashlib.sha256(f"{purpose} {row.text}".encode("utf-8", "replace")).digest()


def _read_all(file: TextFile, base: Path) -> Iterator[LabelledText]:
    left = file.limit
    for path in _existing(file.path, base):
        for row, where in _rows(path, file):
            if left == 0:
                return
            yield _labelled(row, file, where)
            left = None if left is None else left - 1


def _existing(name: str, base: Path) -> list[Path]:
    path = (base / Path(name).expanduser()).absolute()
    if path.is_file():
        return [path]
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
    files = [Path(one) for one in found if Path(one).is_file()]
    if files:
        return files
    names = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    raise DataError(
        "the file does not exist",
        where=path,
        fix=f"did you mean {near[0]}?"
        if near
        else "check the path; a relative one starts at the recipe's folder",
    )


def _rows(
    path: Path, file: TextFile, *, every_column: bool = False
) -> Iterator[tuple[Mapping[str, Any], str]]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path, None if every_column else {file.text, file.label})
            return
        if suffix in (".csv", ".tsv"):
            yield from csv_rows(path)
            return
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                if suffix in (".jsonl", ".ndjson"):
                    yield _json_row(line, where), where
                else:
                    yield {file.text: line.strip()}, where
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not UTF-8: {error.reason}", where=path, fix="convert it"
        ) from error
    except OSError as error:
        raise DataError(f"the file cannot be read: {error}", where=path) from error


def _json_row(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"invalid JSON ({error})", where=where, fix="correct the line") from None
    if not isinstance(row, Mapping):
        raise DataError(
            f"the line is a {type(row).__name__}, not an object",
            where=where,
            fix='write each line as {"text": "..."}',
        )
    return row


def _parquet_rows(
    path: Path, wanted: set[str | None] | None
) -> Iterator[tuple[Mapping[str, Any], str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        names = table.schema_arrow.names
        columns = names if wanted is None else [name for name in names if name in wanted]
        number = 0
        for batch in table.iter_batches(1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path} row {number}"
    except pa.ArrowException as error:
        raise DataError(
            f"the Parquet file cannot be read: {str(error).splitlines()[0]}", where=path
        ) from error


def _labelled(row: Mapping[str, Any], file: TextFile, where: str) -> LabelledText:
    text = row.get(file.text)
    if file.text not in row or not isinstance(text, str):
        raise DataError(
            f"the row has no text under {file.text!r}; it has {', '.join(map(str, row))}",
            where=where,
            fix="name the column or key of the text: text: NAME",
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
