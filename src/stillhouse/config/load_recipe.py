"""Reads recipes: YAML text, command-line overrides, strict types, and one clear error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.config.recipe_errors import described, place
from stillhouse.config.recipe_values import read_values
from stillhouse.config.recipe_yaml import (
    DEEPEST,
    Key,
    Lines,
    dotted,
    read_document,
    read_file,
    read_scalar,
)
from stillhouse.errors import RecipeError, shown, shown_value
from stillhouse.language_model.recipe import Recipe
from stillhouse.section import require_type

AnyRecipe = Recipe | ClassifyRecipe | AnsweringRecipe
TASKS: dict[str, type[ClassifyRecipe | AnsweringRecipe]] = {
    "classify": ClassifyRecipe,
    "extract": AnsweringRecipe,
    "generate": AnsweringRecipe,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe's YAML file and apply overrides of the form `a.b=c`, where c is YAML.

    Raises RecipeError with the file, the line, the key, the closest valid key, and a fix.
    """
    path = Path(path)
    try:
        text = read_file(path)
    except FileNotFoundError:
        raise RecipeError(
            "the recipe file does not exist", where=path, fix=_other_yaml(path)
        ) from None
    return recipe_from_text(text, path, overrides)


def read_recipe(
    recipe: AnyRecipe | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> tuple[AnyRecipe, Path]:
    """Return the recipe for a path, dictionary, or recipe object, and the folder that its paths are
    relative to.

    base: by default, the recipe file's folder, or the working directory. Raises RecipeError.
    """
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides), base or Path(recipe).parent
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(recipe, overrides=overrides)
    require_type(
        recipe,
        AnyRecipe,
        "recipe",
        "a path, a dictionary, or a recipe",
        "give the path of a recipe, such as recipes/demo.yaml",
        RecipeError,
    )
    return recipe, base or Path.cwd()


def load_language_model_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Like `load_recipe`. Raises RecipeError if the recipe has a task."""
    recipe = load_recipe(path, overrides)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            "this recipe has a task, but this command only supports language models without one",
            where=path,
            fix="use run, check, preview, report, or predict with a recipe that has `task`",
        )
    return recipe


def recipe_from_text(text: str, path: Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Like `load_recipe`, but from the file's current or future text."""
    raw, lines = read_document(text, str(path))
    return _validate(raw, lines, str(path), overrides)


def _root(raw: Mapping[str, Any], lines: Lines, source: str) -> type[AnyRecipe]:
    if "task" not in raw:
        return Recipe
    task = raw["task"]
    kind = task.get("kind") if isinstance(task, dict) else None
    if not isinstance(kind, str) or kind not in TASKS:
        problem = (
            "`task` needs the key `kind`" if not kind else f"unknown kind of task: {shown(kind)}"
        )
        raise RecipeError(
            problem,
            where=place(("task", "kind"), lines, source),
            fix=f"set kind to one of: {', '.join(TASKS)}",
        )
    return TASKS[kind]


def parse_recipe(
    raw: Mapping[str, Any], source: str = "recipe", overrides: Sequence[str] = ()
) -> AnyRecipe:
    """Like `load_recipe`, but from a dictionary. Raises RecipeError."""
    return _validate(_copied(raw, source), {}, source, overrides)


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors (YAML language server, VS Code)."""
    schema: dict[str, Any] = TypeAdapter(AnyRecipe).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Stillhouse recipe"
    return schema


# --- overrides -------------------------------------------------------------------------------


def _apply_override(raw: dict[str, Any], override: str) -> Key:
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts) or len(parts) > DEEPEST:
        raise RecipeError(
            f"--set {shown_value(override)} is not of the form a.b=c",
            where="--set",
            fix="write, for example, --set train.learning_rate=1e-4",
        )
    value = read_scalar(text, f"--set {shown(name.strip())}")
    here: Any = raw
    key: list[str | int] = []
    for depth, part in enumerate(parts):
        if isinstance(here, list):
            index = int(part) if re.fullmatch("[0-9]{1,6}", part) else len(here)
            if index >= len(here):
                last = len(here) - 1
                raise RecipeError(
                    f"`{dotted(tuple(key))}` is a list of {len(here)} items",
                    where=f"--set {shown(name)}",
                    fix=f"use an index from 0 to {last}, or set the entire list"
                    if here
                    else f"set the entire list: --set {dotted(tuple(key))}=[...]",
                )
            key.append(index)
        else:
            key.append(part)
        at: Any = key[-1]
        if depth == len(parts) - 1:
            here[at] = value
        elif not isinstance(here[at] if isinstance(here, list) else here.get(at), dict | list):
            here[at] = {}
        here = here[at]
    return tuple(key)


# --- values ----------------------------------------------------------------------------------


def _validate(
    raw: dict[str, Any], lines: Lines, source: str, overrides: Sequence[str]
) -> AnyRecipe:
    for override in overrides:
        key = _apply_override(raw, override)
        lines = {at: line for at, line in lines.items() if at[: len(key)] != key} | {key: 0}
    root = _root(raw, lines, source)

    def reject(key: Key, what: str, fix: str) -> NoReturn:
        raise RecipeError(f"`{dotted(key)}`: {what}", where=place(key, lines, source), fix=fix)

    values = read_values(raw, root, reject)
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise described(error, lines, source, root) from None


def _copied(value: Any, source: str, depth: int = 0) -> Any:
    """Copy mappings and lists, because overrides change them."""
    if depth > DEEPEST:
        raise RecipeError(
            f"values are nested more than {DEEPEST} levels deep",
            where=source,
            fix="remove levels",
        )
    if isinstance(value, Mapping):
        return {name: _copied(inner, source, depth + 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner, source, depth + 1) for inner in value]
    return value


def _other_yaml(path: Path) -> str:
    folder = path.parent
    names = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {folder / near[0]}?"
    return "check the path, or write a recipe with `stillhouse init`"
