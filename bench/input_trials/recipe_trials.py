"""Trials with the recipes of recipes/, changed in one place or written in unusual YAML.

The numbers of an accepted recipe must be usable in a run, according to this module's own table of
bounds, and `stillhouse check` must report its findings without a traceback.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.input_trials import files
from bench.input_trials.odd_recipes import CHANGES, Place, Text, data_folder, recipes
from bench.input_trials.trial import Refusal, Trial
from stillhouse.check import check_recipe
from stillhouse.config.load_recipe import load_recipe
from stillhouse.errors import DataError

CHECKED = 4
"""One of this many accepted recipes is also checked with `stillhouse check`."""
CHECK_SECONDS = 8.0
"""Additional processor time: `check` estimates memory by tracing a step of the recipe's models."""

BOUNDS: dict[str, tuple[float, float]] = {
    "learning_rate": (1e-12, 1e4), "epochs": (1e-6, 1e6), "weight_decay": (0, 100),
    "betas": (0, 1 - 1e-12), "temperature": (0, 1000), "top_p": (1e-6, 1), "warmup": (0, 1),
    "seed": (0, 2**32 - 1), "context": (8, 1e8), "batch_size": (1, 1e8), "test_share": (1e-6, 1),
    "max_usd": (1e-9, 1e9), "timeout": (1e-3, 1e7), "max_grad_norm": (1e-12, 1e9),
}  # fmt: skip
"""Values that a run could use, by key."""
USUAL = (1e-12, 1e15)
"""Bounds for all other numbers except 0."""


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    recipe = recipes()[number % len(recipes())]
    shutil.copytree(data_folder(), folder / "data", dirs_exist_ok=True)
    if chance.random() < 0.05:
        return _file(chance, folder)
    if chance.random() < 0.06:
        return _override(chance, folder, recipe)
    change = chance.choice(CHANGES)
    changed = change(chance, recipe)
    files.write(folder, "base.yaml", recipe.text)
    path = files.write(folder, "recipe.yaml", changed.data)
    # The model's configuration defines the types of overrides, and only `check` reads it.
    check = number % CHECKED == 0 or "student.overrides" in changed.name
    name = f"{recipe.name}: {changed.name}"
    return _trial(name, path, folder, changed.refusal, check, said=changed.said)


def _trial(
    name: str,
    path: Path,
    folder: Path,
    refusal: Refusal,
    check: bool,
    *overrides: str,
    said: tuple[Place, str] | None = None,
) -> Trial:
    flag = folder / "ran"

    def read() -> Any:
        recipe = load_recipe(path, overrides)
        findings = check_recipe(path, [*overrides, f"folder={folder / 'run'}"]) if check else []
        errors = [finding for finding in findings if finding.level == "error"]
        if errors and refusal == "must":
            raise DataError(errors[0].text, where=str(path), fix=errors[0].fix)
        return recipe

    def wrong(recipe: Any) -> str | None:
        if flag.exists():
            return "the recipe ran a command"
        if refusal == "must":
            return "accepted"
        if said is not None and _at(recipe.model_dump(), said[0]) != said[1]:
            return f"read as {_at(recipe.model_dump(), said[0])!r}"
        problems = list(_unusable(recipe.model_dump()))
        if problems:
            return "; ".join(problems)
        if refusal == "never":
            return _other(recipe.model_dump(), path)
        return None

    return Trial(name, read, wrong, refusal, more_seconds=CHECK_SECONDS if check else 0.0)


def _at(raw: Any, place: Place) -> Any:
    for key in place:
        raw = raw[key]
    return raw


def _other(found: dict[str, Any], path: Path) -> str | None:
    """Compare a recipe that should only look different with the original."""
    base = path.with_name("base.yaml")
    expected = load_recipe(base).model_dump()
    return None if found == expected else "differs from the original recipe"


def _unusable(value: Any, key: str = "", name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from _unusable(each, str(inner), f"{name}.{inner}".strip("."))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _unusable(each, key, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        low, high = BOUNDS.get(key, (-USUAL[1], USUAL[1]))
        tiny = key not in BOUNDS and value != 0 and abs(value) < USUAL[0]
        if not math.isfinite(value) or not low <= value <= high or tiny:
            yield f"{name}: {value}"


# --- files and overrides ---------------------------------------------------------------------


def _file(chance: random.Random, folder: Path) -> Trial:
    """Paths that are not regular files."""
    path = folder / "recipe.yaml"
    how = chance.choice(
        ["missing", "a folder", "a pipe", "/dev/zero", "a loop", "a long name", "NUL"]
    )
    if how == "a folder":
        path.mkdir()
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "/dev/zero":
        path.symlink_to("/dev/zero")
    elif how == "a loop":
        path.symlink_to(path)
    elif how == "a long name":
        path = folder / ("x" * 300 + ".yaml")
    elif how == "NUL":
        path = folder / "a\0b.yaml"
    return _trial(f"a recipe file: {how}", path, folder, "must", False)


def _override(chance: random.Random, folder: Path, recipe: Text) -> Trial:
    """`--set` with invalid values."""
    path = files.write(folder, "recipe.yaml", recipe.text)
    given = chance.choice(
        [
            "a", "=x", "train.learning_rate=abc", "nonsense=1", "x.0.y=1", "seed=[", "seed=&a [*a]",
            "data.sources.70.path=x", "seed=.inf", "seed=on", "..=1", "train..x=1", "seed=",
            "train=7", "data=null", "seed=1:30", "train.learning_rate=1e308", "name=[]",
            "seed=" + "9" * 5000, "train.0=1", "seed={a: {b: 1}}", "name=\0",
        ]
    )  # fmt: skip
    return _trial(f"{recipe.name}: --set {given[:40]!r}", path, folder, "must", False, given)
