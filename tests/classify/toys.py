"""A classification task for tests: texts of a few words, and a teacher with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.config.load_recipe import parse_recipe
from tests import tiny

WORDS = {"pets": ["cat", "dog", "bird"], "food": ["soup", "cake", "bread"]}


def rows(count: int) -> list[tuple[int, str, str]]:
    """`count` tuples of a number, a word, and the word's label."""
    names = ["pets", "food"]
    return [
        (number, WORDS[names[number % 2]][number // 2 % 3], names[number % 2])
        for number in range(count)
    ]


def write_texts(path: Path, count: int, label: bool) -> None:
    rows_made = []
    for number, word, name in rows(count):
        row = {"text": f"{word} number {number}"}
        rows_made.append({**row, "label": name} if label else row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_made))


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """A complete recipe; its teacher and texts are created if they do not exist."""
    if not (folder / "teacher").exists():
        tiny.save_model(folder / "teacher", max_position_embeddings=512)
        write_texts(folder / "texts.jsonl", 40, label=False)
        write_texts(folder / "gold.jsonl", 40, label=True)
    raw: dict[str, Any] = {
        "name": "tiny",
        "folder": str(folder / "run"),
        "task": {"kind": "classify", "labels": ["pets", "food"]},
        "teacher": {"model": str(folder / "teacher"), "precision": "float32"},
        "data": {"texts": [{"path": str(folder / "texts.jsonl")}]},
        "student": {"start": "random", "hidden_size": 16, "layers": 1, "heads": 2},
        "train": {"epochs": 2, "batch_size": 8, "precision": "float32", "checkpoint_every": 2},
        "evaluate": {"speed_texts": 4},
    }
    for name, section in sections.items():
        raw[name] = section
    return raw


GOLD: dict[str, Any] = {"label": "label"}


def with_gold(folder: Path) -> dict[str, Any]:
    return {"texts": [{"path": str(folder / "gold.jsonl"), **GOLD}]}


def parsed(raw: dict[str, Any]) -> ClassifyRecipe:
    """Parse a raw recipe, which must be a classify recipe."""
    found = parse_recipe(raw)
    assert isinstance(found, ClassifyRecipe)
    return found
