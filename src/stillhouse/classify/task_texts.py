"""Reads a classification task's texts and labels, drops duplicates, and splits the texts."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.atomic_files import write_atomically
from stillhouse.checksums import sha
from stillhouse.classify.classify_config import (
    ClassifyRecipe,
    ClassifyTask,
    check_labels,
    phrase_of,
)
from stillhouse.data.data_files import known_format
from stillhouse.data.file_search import find_files
from stillhouse.data.row_reader import read_rows
from stillhouse.data.words import MISSING, collapsed, normalized
from stillhouse.errors import DataError, RecipeError
from stillhouse.tasks.labeled_texts import (
    FEWEST,
    LabeledText,
    divide_texts,
    label_of,
    read_files,
    require_enough,
)

Part = Literal["train", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "calibration", "test")
LABELS = "labels.json"

_LABEL = "label"
"""The column or key of the labels in task.labels_path; a text file has one label per line."""
_MOST_SEVERAL = 0.1
"""Maximum share of texts with conflicting labels, for example because annotators disagree."""
_MOST_LABELS = 0.5
"""Number of labels per labeled text above which a note warns that the column may contain ids."""

_MISSING = re.compile(MISSING, re.I)
_WHOLE = re.compile(r"[+-]?[0-9]+(\.0+)?")
_JOINED = re.compile(r"[;|,/+]")

UNKNOWN = -1
"""The index of an unknown reference label."""


@dataclass(frozen=True)
class Texts:
    """A task's texts, by part.

    labels: each label's phrase, in order. repeated: number of texts that were dropped as
    duplicates. notes: remarks about the labels, which are not saved.
    """

    labels: dict[str, str]
    train: list[LabeledText]
    calibration: list[LabeledText]
    test: list[LabeledText]
    repeated: int = 0
    notes: tuple[str, ...] = ()

    def part(self, name: Part) -> list[LabeledText]:
        return getattr(self, name)

    @property
    def all(self) -> list[LabeledText]:
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
        parts: dict[str, Any] = {}
        for name in PARTS:
            # Not splitlines: a text may contain other characters that end lines.
            lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
            parts[name] = [LabeledText(**json.loads(line)) for line in lines if line]
        return cls(facts["labels"], repeated=facts["repeated"], **parts)


def gold_ids(texts: Sequence[LabeledText], labels: Sequence[str]) -> Tensor | None:
    """Return the index of each text's reference label, [N], `UNKNOWN` if it has none; None if fewer
    than `FEWEST` texts have one."""
    if sum(row.gold is not None for row in texts) < FEWEST:
        return None
    index = {label: number for number, label in enumerate(labels)}
    return torch.tensor([UNKNOWN if row.gold is None else index[row.gold] for row in texts])


def prepare_texts(recipe: ClassifyRecipe, base: Path) -> Texts:
    """Read a recipe's texts and split them.

    Raises DataError for unreadable files, empty texts, too few texts, a label that is not in the
    task's list, or too many texts with conflicting labels, and RecipeError if there are no labels
    or two are indistinguishable.
    """
    section = recipe.data
    given = read_files(section.texts, base, label_of)
    tests = read_files(section.test, base, label_of)
    rows = [*given, *tests]
    of_texts = recipe.task.labels is None and recipe.task.labels_path is None
    if of_texts:
        rows = _with_whole_numbers(rows)
    labels = task_labels(recipe.task, base, rows)
    known = [_with_known_label(row, labels) for row in rows]
    agreed, notes = _one_label_each(known)
    if of_texts:
        labeled = sum(row.gold is not None for row in agreed)
        notes += tuple(_on_labels(list(labels), labeled))
    given, tests = agreed[: len(given)], agreed[len(given) :]
    examples = [example.text for example in recipe.task.examples]
    train, test, repeated = divide_texts(given, tests, section.test_share, recipe.seed, examples)
    apart = round(section.calibration_share * len(train))
    texts = Texts(labels, train[apart:], train[:apart], test, repeated, notes)
    require_enough({name: texts.part(name) for name in PARTS})
    return texts


def task_labels(task: ClassifyTask, base: Path, rows: Sequence[LabeledText]) -> dict[str, str]:
    """Return each label's phrase. Raises RecipeError or DataError."""
    if task.labels is not None:
        return task.labels
    if task.labels_path is not None:
        path = _labels_file(task.labels_path, base)
        lines = read_rows(path, format=known_format(path) or "text", text_key=_LABEL)
        names, where = [_listed_label(*line) for line in lines], str(path)
    else:
        names, where = sorted({row.gold for row in rows if row.gold is not None}), "task.labels"
        if not names:
            raise RecipeError(
                "the task has no labels",
                where=where,
                fix="list them in task.labels, name a file in task.labels_path, or name the column "
                "that contains them in data.texts.0.label",
            )
    labels = {name: phrase_of(name) for name in names}
    try:
        check_labels(labels)
    except ValueError as error:
        fix = "list them in task.labels"
        if len(labels) > 1:
            fix = (
                "write each label in one spelling, or give each a phrase of its own in "
                'task.labels: {"label": "phrase"}'
            )
        raise RecipeError(str(error), where=where, fix=fix) from None
    for example in task.examples:
        if example.label not in labels:
            raise RecipeError(
                f"an example has the label {example.label!r}, which is not among the labels",
                where="task.examples",
                fix=_nearest(example.label, labels),
            )
    return labels


def _labels_file(name: str, base: Path) -> Path:
    """The file of task.labels_path. Raises RecipeError if there are several."""
    first, *others = find_files(name, base)
    if others:
        raise RecipeError(
            f"{name!r} matches {1 + len(others)} files, for example {first.name} and "
            f"{others[0].name}",
            where="task.labels_path",
            fix="name the one file that lists the labels",
        )
    return first


def _listed_label(row: Mapping[str, Any], where: str) -> str:
    """Read a label from a row of task.labels_path. Raises DataError."""
    if _LABEL not in row:
        raise DataError(
            f"the row has no label under {_LABEL!r}; its keys are {', '.join(map(str, row))}",
            where=where,
            fix=f"name the column or key of the labels {_LABEL!r}, or write the labels to a .txt "
            "file, one per line",
        )
    value = row[_LABEL]
    label = value.strip() if isinstance(value, str) else label_of(value, where)
    if not label:
        raise DataError("the label is empty", where=where, fix="remove the row")
    return label


def _with_whole_numbers(rows: Sequence[LabeledText]) -> list[LabeledText]:
    """If all labels are whole numbers, write labels such as 1.0 as 1. Programs that store a column
    with empty cells as floats write 1.0 where other files contain 1."""
    if not all(row.gold is None or _WHOLE.fullmatch(row.gold) for row in rows):
        return list(rows)
    return [replace(row, gold=row.gold and _whole(row.gold)) for row in rows]


def _whole(label: str) -> str:
    return label.split(".")[0] if _WHOLE.fullmatch(label) else label


def _with_known_label(row: LabeledText, labels: Mapping[str, str]) -> LabeledText:
    """Spell the row's label as the task does. Raises DataError for an unknown label."""
    if row.gold is None or row.gold in labels:
        return row
    same = next((label for label in labels if _whole(collapsed(label)) == _whole(row.gold)), None)
    if same is None:
        raise DataError(
            f"the label {row.gold!r} is not in the task's list",
            where=row.where,
            fix=_nearest(row.gold, labels),
        )
    return replace(row, gold=same)


def _nearest(label: str, labels: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(label, list(labels), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}labels are {', '.join(list(labels)[:12])}{' ...' if len(labels) > 12 else ''}"


def _on_labels(names: Sequence[str], labeled: int) -> Iterator[str]:
    """Yield notes on values that mean nothing to the teacher, or that may not be labels. labeled:
    number of texts with a label."""
    if all(re.fullmatch(r"[+-]?\d+(\.\d+)?|true|false", name.casefold()) for name in names):
        yield (
            f"the labels are bare numbers or truth values ({', '.join(names[:8])}), which do not "
            "tell the teacher what they mean: give each a phrase in task.labels, e.g. "
            f'{{"{names[0]}": what it means}}'
        )
    for name in names:
        if _MISSING.fullmatch(name):
            yield (
                f"{name!r} is read as a label: leave the cell empty if the text's label is unknown"
            )
        parts = [part.strip() for part in _JOINED.split(name)]
        if len(parts) > 1 and all(part in names for part in parts):
            yield (
                f"the label {name!r} consists of other labels: several labels per text are a "
                "different task"
            )
    if len(names) > _MOST_LABELS * labeled:
        yield (
            f"the {labeled:,} labeled texts have {len(names):,} labels: check that the column of "
            "the label contains classes"
        )


def _one_label_each(rows: Sequence[LabeledText]) -> tuple[list[LabeledText], tuple[str, ...]]:
    """Give equal texts the same label: the only one that any of them has, or None if they have
    several. Return the rows, and a note about conflicting labels.

    Raises DataError if too many texts have several labels, because that is a different task.
    """
    found: dict[str, dict[str, str]] = {}
    keys = [normalized(row.text) for row in rows]
    for row, key in zip(rows, keys, strict=True):
        if row.gold is not None:
            found.setdefault(key, {}).setdefault(row.gold, row.where)
    several = [key for key, golds in found.items() if len(golds) > 1]
    notes: tuple[str, ...] = ()
    if several:
        (one, there), (other, elsewhere), *_ = found[several[0]].items()
        example = f"e.g. {several[0][:60]!r} is {one!r} ({there}) and {other!r} ({elsewhere})"
        if len(several) > _MOST_SEVERAL * len(found):
            raise DataError(
                f"{len(several):,} of {len(found):,} texts have several labels, {example}",
                where="data",
                fix="give each text one label; several labels per text are a different task",
            )
        notes = (
            f"{len(several):,} of {len(found):,} texts have several labels, so their label counts "
            f"as unknown: {example}",
        )
    known = {key: next(iter(golds)) for key, golds in found.items() if len(golds) == 1}
    agreed = [replace(row, gold=known.get(key)) for row, key in zip(rows, keys, strict=True)]
    return agreed, notes


def labels_sha256(task: ClassifyTask, base: Path) -> str | None:
    """The hash of the file that lists the labels; None if the recipe names none."""
    return sha(_labels_file(task.labels_path, base)) if task.labels_path else None
