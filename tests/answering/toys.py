"""Texts with names and ages, a schema, and extract and generate recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.config.load_recipe import parse_recipe
from tests import tiny

NAMES = ["Anna", "Bo", "Cleo", "Dan", "Eve", "Finn"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def text_of(number: int) -> str:
    return f"{NAMES[number % len(NAMES)]} is {20 + number}."


def truth(text: str) -> dict[str, Any]:
    found = re.search(r"(\w+) is (\d+)\.", text)
    assert found is not None
    return {"name": found[1], "age": int(found[2])}


def recipe(folder: Path, kind: str, **sections: Any) -> dict[str, Any]:
    """A complete recipe; its models and texts are created if they do not exist."""
    if not (folder / "teacher").exists():
        tiny.save_model(folder / "teacher")
        tiny.save_model(folder / "small", seed=1, hidden_size=16, intermediate_size=32)
        rows = [{"text": text_of(number), "gold": truth(text_of(number))} for number in range(20)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "schema.json").write_text(json.dumps(SCHEMA))
    task: dict[str, Any] = {"kind": kind, "prompt": "About: {text}"}
    if kind == "extract":
        task["json_schema"] = str(folder / "schema.json")
    raw: dict[str, Any] = {
        "name": "tiny",
        "folder": str(folder / "run"),
        "task": task,
        "teacher": {
            "model": str(folder / "teacher"),
            "precision": "float32",
            "sampling": {"temperature": 0.0, "max_tokens": 12},
        },
        "data": {"texts": [{"path": str(folder / "texts.jsonl")}], "context": 96},
        "filters": {"truncated": False, "exact_duplicates": False},
        "student": {"start": "pruned", "layers": 1, "calibration_tokens": 64},
        "train": {"batch_size": 4, "precision": "float32", "epochs": 2},
        "evaluate": {"speed_texts": 2},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return raw


def api(folder: Path, url: str) -> dict[str, Any]:
    """A recipe's sections for a teacher behind an API."""
    sampling = {"temperature": 0.0, "max_tokens": 40}
    return {
        "teacher": {
            "api": {"base_url": url, "model": "teacher"},
            "model": None,
            "sampling": sampling,
        },
        "student": {
            "start": "pretrained",
            "model": str(folder / "small"),
            "layers": None,
            "calibration_tokens": None,
        },
    }


def clean(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the keys that a test has set to None."""
    return {
        name: {key: value for key, value in section.items() if value is not None}
        if isinstance(section, dict)
        else section
        for name, section in raw.items()
    }


def parsed(raw: dict[str, Any]) -> AnsweringRecipe:
    """Parse a raw recipe, which must be an extract or generate recipe."""
    found = parse_recipe(raw)
    assert isinstance(found, AnsweringRecipe)
    return found
