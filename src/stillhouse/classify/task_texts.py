"""Reads the texts of a task, drops duplicates, and splits them into parts."""

from __future__ import annotations

import difflib
import hashlib
import heapq
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from stillhouse.classify.classify_config import (
    ClassifyRecipe,
    ClassifyTask,
    TextFile,
    check_labels,
    phrase_of,
)
from stillhouse.data.data_files import FileFormat, find_files, known_format
from stillhouse.data.row_reader import header_hint, not_empty, read_rows
from stillhouse.data.words import collapsed, normalized
from stillhouse.errors import DataError, RecipeError
from stillhouse.runfolder import sha, write_atomically

Part = Literal["train", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "calibration", "test")
LABELS = "labels.json"
FEWEST = 4
"""Minimum number of texts in a part to train or measure on."""

Reference = Callable[[Any, str], str | None]
"""Called with a value of the label column and the row's place."""

_LABEL_LINE = TextFile(path="", text="label")
_MOST_SEVERAL = 0.1
"""Maximum share of texts with several labels, for example because annotators disagree."""

_MISSING = re.compile(r"na|null|<na>|\\n|#(n/a|ref!|name\?|value!|div/0!|null!|num!)", re.I)
"""Written by R, databases and Excel into an empty or broken cell."""
_JOINED = re.compile(r"[;|,/+]")
_LIST = re.compile(r"\s*[\[{(]\s*['\"].*['\"]\s*,?\s*[\]})]\s*", re.DOTALL)
"""A list as text, in JSON or as Python prints it."""

UNKNOWN = -1
"""The index of an unknown reference label."""


@dataclass(frozen=True)
class LabeledText:
    """gold: the reference label or answer, None if unknown. where: file and row."""

    text: str
    gold: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Texts:
    """labels: each with its phrase, in order. repeated: texts that were dropped as duplicates.
    notes: about the labels; not saved."""

    labels: dict[str, str]
    train: list[LabeledText]
    calibration: list[LabeledText]
    test: list[LabeledText]
    repeated: int = 0
    notes: tuple[str, ...] = ()

    def part(self, name: Part) -> list[LabeledText]:
        return {"train": self.train, "calibration": self.calibration, "test": self.test}[name]

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


def gold_ids(texts: Sequence[LabeledText], labels: Sequence[str]) -> list[int] | None:
    """Index of each text's reference label, UNKNOWN if it has none; None if fewer than FEWEST have
    one."""
    if sum(row.gold is not None for row in texts) < FEWEST:
        return None
    index = {label: number for number, label in enumerate(labels)}
    return [UNKNOWN if row.gold is None else index[row.gold] for row in texts]


def prepare_texts(recipe: ClassifyRecipe, base: Path) -> Texts:
    """Read a recipe's texts and split them.

    Raises DataError for unreadable files, empty texts, too few texts, a label that is not in the
    list, many texts with several labels; RecipeError for no labels, or labels that cannot be
    distinguished.
    """
    section = recipe.data
    given = read_files(section.texts, base, label_of)
    tests = read_files(section.test, base, label_of)
    labels = task_labels(recipe.task, base, [*given, *tests])
    known = [_with_known_label(row, labels) for row in (*given, *tests)]
    agreed, notes = _one_label_each(known)
    if recipe.task.labels is None and recipe.task.labels_path is None:
        notes += (*_on_bare_labels(list(labels)), *_on_odd_labels(list(labels)))
    given, tests = agreed[: len(given)], agreed[len(given) :]
    examples = [example.text for example in recipe.task.examples]
    train, test, repeated = divide_texts(given, tests, section.test_share, recipe.seed, examples)
    apart = round(section.calibration_share * len(train))
    texts = Texts(labels, train[apart:], train[:apart], test, repeated, notes)
    require_enough({name: texts.part(name) for name in PARTS})
    return texts


def divide_texts(
    given: Sequence[LabeledText],
    tests: Sequence[LabeledText],
    test_share: float,
    seed: int,
    examples: Sequence[str] = (),
) -> tuple[list[LabeledText], list[LabeledText], int]:
    """Training texts in random order, and test texts, without duplicates; and the number of
    duplicates.

    The content of a text and the seed decide its part, so the order of the files and other
    texts hardly matter. test_share: of `given`, if there are no test texts. examples: texts in the
    teacher's prompt, with their answers; they are excluded from the test texts.
    """
    seen: set[str] = set()
    known = set(map(normalized, examples))
    kept_tests = [row for row in _unrepeated(tests, seen) if normalized(row.text) not in known]
    kept = sorted(_unrepeated(given, seen), key=lambda row: _place(row, str(seed)))
    repeated = len(given) + len(tests) - len(kept) - len(kept_tests)
    if not tests:
        apart = round(test_share * len(kept))
        kept_tests = [row for row in kept[:apart] if normalized(row.text) not in known]
        shown = [row for row in kept[:apart] if normalized(row.text) in known]
        kept = [*shown, *kept[apart:]]
    return kept, kept_tests, repeated


def require_enough(parts: Mapping[str, Sequence[LabeledText]]) -> None:
    """Raise DataError for a part with too few texts."""
    for name, rows in parts.items():
        if len(rows) < FEWEST:
            raise DataError(
                f"the {name} part has {len(rows)} texts, and {FEWEST} are the fewest",
                where="data",
                fix="give more texts, or change the shares of the parts in `data`",
            )


def task_labels(task: ClassifyTask, base: Path, rows: Sequence[LabeledText]) -> dict[str, str]:
    """Each label with its phrase. Raises RecipeError, DataError."""
    if task.labels is not None:
        return task.labels
    if task.labels_path is not None:
        path = find_files(task.labels_path, base)[0]
        lines = read_rows(path, format=known_format(path) or "text", text_key="label")
        found = (labeled_text(line, _LABEL_LINE, where).text for line, where in lines)
        names, where = [name.strip() for name in found], str(path)
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


def _with_known_label(row: LabeledText, labels: Mapping[str, str]) -> LabeledText:
    """The row with its label as spelled in the task. Raises DataError for an unknown label."""
    if row.gold is None or row.gold in labels:
        return row
    same = next((label for label in labels if collapsed(label) == row.gold), None)
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


def _on_bare_labels(names: Sequence[str]) -> tuple[str, ...]:
    """A note if labels are meaningless to the teacher."""
    if not all(re.fullmatch(r"[+-]?\d+(\.\d+)?|true|false", name.casefold()) for name in names):
        return ()
    return (
        f"the labels are bare numbers or truth values ({', '.join(names[:8])}), and the teacher "
        "reads nothing else of them: give each a phrase in task.labels, e.g. "
        f'{{"{names[0]}": what it means}}',
    )


def _on_odd_labels(names: Sequence[str]) -> Iterator[str]:
    """Notes on values that may not be labels: marks of an empty cell, or several labels in one."""
    for name in names:
        if _MISSING.fullmatch(name):
            yield (
                f"{name!r} is read as the name of a label: leave the cell empty if no label is "
                "known"
            )
        parts = [part.strip() for part in _JOINED.split(name)]
        if len(parts) > 1 and all(part in names for part in parts):
            yield (
                f"the label {name!r} consists of other labels: several labels a text are another "
                "task"
            )


def _one_label_each(
    rows: Sequence[LabeledText],
) -> tuple[list[LabeledText], tuple[str, ...]]:
    """The rows, each with the one label that its text has anywhere, None if it has several; and
    a note about them.

    Raises DataError if there are many: texts with several labels are a different task.
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
            f"{len(several):,} of {len(found):,} texts have several labels, which count as not "
            f"known: {example}",
        )
    known = {key: next(iter(golds)) for key, golds in found.items() if len(golds) == 1}
    agreed = [replace(row, gold=known.get(key)) for row, key in zip(rows, keys, strict=True)]
    return agreed, notes


def _unrepeated(rows: Sequence[LabeledText], seen: set[str]) -> Iterator[LabeledText]:
    """Rows without duplicate texts, ignoring case, whitespace and Unicode form."""
    for row in rows:
        key = normalized(row.text)
        if key not in seen:
            seen.add(key)
            yield row


# --- files -----------------------------------------------------------------------------------


def labels_sha256(task: ClassifyTask, base: Path) -> str | None:
    return sha(find_files(task.labels_path, base)[0]) if task.labels_path else None


def files_sha256(files: Sequence[TextFile], base: Path) -> list[str]:
    return [sha(path) for file in files for path in find_files(file.path, base)]


def read_files(
    files: Sequence[TextFile], base: Path, reference: Reference | None = None
) -> list[LabeledText]:
    """The rows of all files. Raises DataError."""
    return [row for file in files for row in read_texts(file, base, reference)]


def read_texts(
    file: TextFile, base: Path, reference: Reference | None = None
) -> Iterator[LabeledText]:
    """The rows of a file, or of all files of a folder or glob. Raises DataError.

    reference: `label_of` (the default) or `answer_of`: how to read the label column.
    """
    found = itertools.islice(_read_all(file, base, reference or label_of), file.limit)
    if file.sample is None:
        return found
    # By content, so that adding a row does not move others.
    return iter(heapq.nsmallest(file.sample, found, key=lambda row: _place(row, "draw")))


def first_row(path: str, base: Path, format: FileFormat | None = None) -> Mapping[str, Any]:
    """All columns of the first row; for plain text, the line under `text`. Raises DataError."""
    file = find_files(path, base)[0]
    rows = read_rows(file, format=format, text_key="text")
    row, where = next(not_empty(rows, "The file", file))
    if header_hint(row) and known_format(file) in ("csv", "tsv"):
        raise DataError(
            f"The file seems to have no header: its columns would be {', '.join(row)[:80]}",
            where=where,
            fix="write the names of the columns into a line before the first row",
        )
    return row


def labeled_text(
    row: Mapping[str, Any], file: TextFile, where: str, reference: Reference | None = None
) -> LabeledText:
    """The row's text and label, under the keys named by `file`. Raises DataError."""
    text = row.get(file.text)
    if file.text not in row or not isinstance(text, str):
        is_it = f"; its value is of type {type(text).__name__}" if file.text in row else ""
        raise DataError(
            f"the row has no text under {file.text!r}{is_it}; it has {', '.join(map(str, row))}",
            where=where,
            fix=f"{header_hint(row)}name the column or key of the text: text: NAME (--text NAME of "
            "`predict`)",
        )
    if not text.strip():
        raise DataError("the text is empty", where=where, fix="remove the row")
    if file.label is None:
        return LabeledText(text, None, where)
    if file.label not in row:
        raise DataError(
            f"the row has no label under {file.label!r}; it has {', '.join(map(str, row))}",
            where=where,
            fix="name the label's column or key, or leave `label` out",
        )
    return LabeledText(text, (reference or label_of)(row[file.label], where), where)


def label_of(value: Any, where: str) -> str | None:
    """A label as text in NFC; None for an empty cell or NaN. 1.0 becomes 1.

    Raises DataError for a value that is not a label: a list, an object, a score.
    """
    if isinstance(value, float | Decimal) and not math.isnan(value):
        whole = math.isfinite(value) and value == int(value)
        value = int(value) if whole else value
    if _is_empty(value):
        return None
    listed = isinstance(value, list) or (isinstance(value, str) and _LIST.fullmatch(value))
    if isinstance(value, str | int) and not listed:
        return collapsed(str(value))
    if listed:
        what, fix = "a list", "write one label; several labels per text are a different task"
    elif isinstance(value, float | Decimal):
        what, fix = f"the number {value}", "name the column that holds the classes"
    else:
        what, fix = f"of type {type(value).__name__}", "write the label as a string"
    raise DataError(f"the label is {what}, not a name", where=where, fix=fix)


def answer_of(value: Any, where: str) -> str | None:
    """A reference answer as text; None for an empty cell. Other values become JSON."""
    if _is_empty(value):
        return None
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_empty(value: Any) -> bool:
    """pandas writes an empty cell as NaN."""
    if isinstance(value, str):
        return value.strip() in ("", "nan", "NaN")
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def _place(row: LabeledText, purpose: str) -> bytes:
    return hashlib.sha256(f"{purpose} {row.text}".encode("utf-8", "replace")).digest()


def _read_all(file: TextFile, base: Path, reference: Reference) -> Iterator[LabeledText]:
    columns = [key for key in (file.text, file.label) if key is not None]
    for path in find_files(file.path, base):
        for row, where in read_rows(path, text_key=file.text, columns=columns):
            yield labeled_text(row, file, where, reference)
