"""The texts of an extract or generate recipe, split into those to learn from and to measure on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.atomic_files import write_atomically
from stillhouse.errors import DataError
from stillhouse.synthesis.filters import Filter, Row
from stillhouse.tasks.labeled_texts import (
    LabeledText,
    answer_of,
    divide_texts,
    read_files,
    require_enough,
)

TEXTS = "texts.json"


@dataclass(frozen=True)
class AnswerTexts:
    """Training and test texts; `gold` of a row is its reference answer. repeated: number of
    duplicates that were left out."""

    train: list[LabeledText]
    test: list[LabeledText]
    repeated: int = 0

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> AnswerTexts:
        raw = json.loads(path.read_text(encoding="utf-8"))
        train, test = ([LabeledText(**row) for row in raw[part]] for part in ("train", "test"))
        return cls(train, test, raw["repeated"])


def prepare_answer_texts(
    recipe: AnsweringRecipe, base: Path, validity: Filter | None
) -> AnswerTexts:
    """Read and split the texts.

    Raises DataError for unreadable files, too few texts, or a reference answer that does not match
    the schema.
    """
    section = recipe.data
    given = read_files(section.texts, base, answer_of)
    tests = read_files(section.test, base, answer_of)
    for row in (*given, *tests):
        problem = None
        if validity is not None and row.gold is not None:
            problem = validity(Row((), row.gold, None, row.where))
        if problem is not None:
            raise DataError(
                f"the reference answer does not match the schema: {problem}",
                where=row.where,
                fix="correct the row, or task.json_schema",
            )
    examples = [example.text for example in recipe.task.examples]
    texts = AnswerTexts(*divide_texts(given, tests, section.test_share, recipe.seed, examples))
    require_enough({"train": texts.train, "test": texts.test})
    return texts
