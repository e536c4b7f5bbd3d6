"""Builds run folders in the states in which unfinished and finished runs leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stillhouse.evaluation.results import EVALUATION, Evaluation, Fidelity, ModelResult
from stillhouse.pipeline.run_progress import ProgressFile
from stillhouse.runfolder import Cost, RunFolder, Stage

RECIPE: dict[str, Any] = {"name": "demo", "teacher": {"model": "org/<teacher>"}}


def begun(root: Path, recipe: Mapping[str, Any] = RECIPE) -> RunFolder:
    (root / "stages").mkdir(parents=True)
    (root / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe)))
    return RunFolder(root)


def partial(root: Path, name: str) -> Path:
    folder = root / "stages" / f".{name}-key.partial"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def finish(root: Path, name: str) -> Path:
    return partial(root, name).rename(root / "stages" / f"{name}-key")


def log_steps(folder: Path, first: int, last: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            row = {"step": step, "tokens": 100 * step, "loss": 1 / step, "forward_kl": 2 / step}
            file.write(json.dumps(row) + "\n")


def record(file: ProgressFile, name: str, seconds: float, *, reused: bool = False) -> None:
    """Record a step that begins and finishes."""
    step = file.begin(file.root, name, f"{name}-key")
    file.end(step, Stage(name, Path(), "", Cost(seconds=seconds), {}, reused))


def write_evaluation(folder: Path) -> None:
    found = [
        ModelResult(role, size, size, size, Fidelity(20.0, kl, 0.5, 0.1, 100))
        for role, size, kl in (("teacher", 2000, 0.0), ("student", 1000, 0.25))
    ]
    Evaluation(found, []).save(folder / EVALUATION)
