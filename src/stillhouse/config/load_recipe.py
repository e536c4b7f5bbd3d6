"""Reads a recipe: YAML text, overrides from the command line, strict types, one clear error."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.errors import RecipeError
from stillhouse.language_model.recipe import Recipe

Key = tuple[str | int, ...]
Lines = dict[Key, int]
AnyRecipe = Recipe | ClassifyRecipe | AnsweringRecipe
TASKS: dict[str, type[ClassifyRecipe | AnsweringRecipe]] = {
    "classify": ClassifyRecipe,
    "extract": AnsweringRecipe,
    "generate": AnsweringRecipe,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Reads the YAML file and applies overrides of the form `a.b=c` (c is YAML).

    Raises RecipeError naming the file, the line, the key, the nearest valid key and what to do.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError("the recipe file is missing", where=path, fix=_other_yaml(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=path) from None
    return recipe_from_text(text, path, overrides)


def read_recipe(
    recipe: AnyRecipe | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> tuple[AnyRecipe, Path]:
    """A recipe from a path, a dictionary or a recipe, and the folder its relative paths start from.

    base: by default the recipe file's folder, or the working directory. Raises RecipeError.
    """
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides), base or Path(recipe).parent
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(recipe, overrides=overrides)
    return recipe, base or Path.cwd()


def load_language_model_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """As `load_recipe`. Raises RecipeError where the recipe is of a task."""
    recipe = load_recipe(path, overrides)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            "this recipe has a task, and the command is for language models without one",
            where=path,
            fix="use run, check, preview, report or predict with a recipe that has `task`",
        )
    return recipe


def recipe_from_text(text: str, path: Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """As `load_recipe`, from the text that the file holds or will hold."""
    raw, lines = _parse(text, path)
    for override in overrides:
        key = _apply_override(raw, override)
        lines[key] = 0
    return _validate(raw, lines, str(path), _root(raw, str(path)))


def _root(raw: dict[str, Any], source: str) -> type[AnyRecipe]:
    if "task" not in raw:
        return Recipe
    task = raw["task"]
    kind = task.get("kind") if isinstance(task, dict) else None
    if kind not in TASKS:
        raise RecipeError(
            f"unknown kind of task {kind!r}" if kind else "`task` needs the key `kind`",
            where=source,
            fix=f"kind is one of {', '.join(TASKS)}",
        )
    return TASKS[kind]


def parse_recipe(
    raw: Mapping[str, Any], source: str = "recipe", overrides: Sequence[str] = ()
) -> AnyRecipe:
    """As `load_recipe`, from a dictionary. Raises RecipeError."""
    copied = copy.deepcopy(dict(raw))
    for override in overrides:
        _apply_override(copied, override)
    return _validate(copied, {}, source, _root(copied, source))


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors (YAML language server, VS Code)."""
    schema: dict[str, Any] = TypeAdapter(AnyRecipe).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Stillhouse recipe"
    return schema


# --- YAML with line numbers ------------------------------------------------------------------


def _parse(text: str, path: Path) -> tuple[dict[str, Any], Lines]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(
            f"the recipe is not valid YAML: {problem}",
            where=where,
            fix="check the indentation, and quote values that hold ': ' or start with a symbol",
        ) from None
    if not isinstance(raw, dict):
        raise RecipeError(
            "the recipe is empty or not a mapping of keys to values",
            where=path,
            fix="start from recipes/demo.yaml",
        )
    lines: Lines = {}
    _index_lines(node, (), lines, path)
    return raw, lines


def _index_lines(node: yaml.Node | None, key: Key, lines: Lines, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            child = (*key, key_node.value)
            if child in lines:
                raise RecipeError(
                    f"the key `{dotted(child)}` is given twice",
                    where=f"{path}, lines {lines[child]} and {key_node.start_mark.line + 1}",
                    fix="remove one of the two",
                )
            lines[child] = key_node.start_mark.line + 1
            _index_lines(value_node, child, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            _index_lines(item, (*key, index), lines, path)


def dotted(key: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in key)


def _other_yaml(path: Path) -> str:
    folder = path.parent
    names = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {folder / near[0]}?"
    return "check the path; the repository's recipes/ folder has examples"


# --- overrides -------------------------------------------------------------------------------


def _apply_override(raw: dict[str, Any], override: str) -> Key:
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"--set {override!r} is not of the form a.b=c",
            fix="for example --set train.learning_rate=1e-4",
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"the value of --set {name} is not valid YAML: {error}", fix="quote it"
        ) from None
    key = tuple(int(part) if part.isdigit() else part for part in parts)
    here: Any = raw
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                raise RecipeError(
                    f"--set {name}: `{dotted(key[:depth])}` is a list of {len(here)} items",
                    fix=f"use an index from 0 to {len(here) - 1}, or set the whole list",
                )
            if last:
                here[part] = value
            elif not isinstance(here[part], dict | list):
                here[part] = {}
            here = here[part]
        else:
            part = str(part)
            if last:
                here[part] = value
            elif not isinstance(here.get(part), dict | list):
                here[part] = {}
            here = here[part]
    return key


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text (it wants 1.0e-4); people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


# --- types -----------------------------------------------------------------------------------


def _validate(raw: dict[str, Any], lines: Lines, source: str, root: type[AnyRecipe]) -> AnyRecipe:
    try:
        return root.model_validate(_numbers(raw, root))
    except ValidationError as error:
        problems = error.errors()
        described = [_describe(problem, lines, source, root) for problem in problems]
        what, where, fix = described[0]
        if len(described) > 1:
            more = "; ".join(text for text, _, _ in described[1:4])
            what += f"\n  also:  {more}"
        raise RecipeError(what, where=where, fix=fix) from None


def _numbers(raw: Any, annotation: Any) -> Any:
    """Turns `3e-4`, text to YAML 1.1, into the number where the recipe wants a number."""
    models = _models_in(annotation)
    if isinstance(raw, dict) and models:
        model = _chosen(models, raw)
        fields = model.model_fields if model else {}
        renamed = getattr(model, "renamed", {})
        return {
            key: _numbers(value, fields[name].annotation) if name in fields else value
            for key, value in raw.items()
            for name in (renamed.get(key, key),)
        }
    if isinstance(raw, list):
        return [_numbers(item, annotation) for item in raw]
    if isinstance(raw, str) and float in _leaf_types(annotation):
        return _scientific(raw)
    return raw


def _leaf_types(annotation: Any) -> set[Any]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return set()
    if not arguments:
        return {annotation}
    return {leaf for argument in arguments for leaf in _leaf_types(argument)}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for argument in typing.get_args(annotation) for m in _models_in(argument)]


def _tag_key(models: list[type[BaseModel]]) -> str | None:
    """The key that tells the variants of a union apart: `kind` or `start`."""
    if len(models) < 2:
        return None
    return next(k for k in ("kind", "start") if all(k in m.model_fields for m in models))


def _chosen(models: list[type[BaseModel]], raw: dict[str, Any]) -> type[BaseModel] | None:
    tag_key = _tag_key(models)
    if tag_key is None:
        return models[0]
    by_tag = {tag: m for m in models for tag in typing.get_args(m.model_fields[tag_key].annotation)}
    default = next((m for m in models if not m.model_fields[tag_key].is_required()), None)
    return by_tag.get(raw[tag_key]) if tag_key in raw else default


def _describe(
    problem: ErrorDetails, lines: Lines, source: str, root: type[BaseModel]
) -> tuple[str, str, str | None]:
    """One pydantic error as (what, where, fix). Union tags are dropped from the key."""
    key, model = _locate(problem["loc"], root)
    line = lines.get(key) or lines.get(key[:-1])
    if lines.get(key) == 0:
        where = f"--set {dotted(key)}"
    else:
        where = f"{source}, line {line}" if line else source
    name = dotted(key) or "recipe"
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        valid = list(model.model_fields) if model else []
        near = difflib.get_close_matches(str(key[-1]), valid, n=1, cutoff=0.5)
        fix = f"did you mean `{near[0]}`? " if near else "remove it. "
        section = dotted(key[:-1]) or "the recipe"
        return f"unknown key `{name}`", where, f"{fix}Valid keys of {section}: {', '.join(valid)}"
    if kind == "missing":
        return f"the key `{name}` is missing", where, f"add `{key[-1]}:`{_hint(model, key)}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = str(problem.get("ctx", {}).get("discriminator", "")).strip("'")
        expected = problem.get("ctx", {}).get("expected_tags")
        said = given.get(tag) if isinstance(given, dict) else None
        models = _union_at(key, root)
        allowed = expected or ", ".join(
            repr(t) for m in models for t in typing.get_args(m.model_fields[tag].annotation)
        )
        what = f"`{name}` needs the key `{tag}`" if said is None else f"unknown {tag} {said!r}"
        near = difflib.get_close_matches(str(said), allowed.replace("'", "").split(", "), n=1)
        fix = f"did you mean `{tag}: {near[0]}`? " if near else ""
        return f"{what} in `{name}`" if said else what, where, f"{fix}{tag} is one of {allowed}"
    message = problem["msg"].removeprefix("Value error, ")
    what = f"`{name}`: {message[0].lower() + message[1:]}"
    if not isinstance(given, dict | list):
        what += f" (it is {given!r})"
    about = _hint(model, key).strip(" #")
    return what, where, f"{key[-1]}: {about}" if about else None


def _locate(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[Key, type[BaseModel] | None]:
    """Key in the file, and the section class that holds its last part."""
    key: list[str | int] = []
    holder: type[BaseModel] | None = root
    annotation: Any = root
    for part in loc:
        models = _models_in(annotation)
        tag_key = _tag_key(models)
        if tag_key and not isinstance(part, int):
            chosen = _chosen(models, {tag_key: part})
            if chosen is not None:
                annotation = chosen
                continue
        key.append(part)
        if isinstance(part, int):
            continue
        holder = models[0] if len(models) == 1 else holder
        field = holder.model_fields.get(part) if holder else None
        annotation = field.annotation if field else None
    return tuple(key), holder


def _union_at(key: Key, root: type[BaseModel]) -> list[type[BaseModel]]:
    annotation: Any = root
    for part in key:
        if isinstance(part, int):
            continue
        annotation = _models_in(annotation)[0].model_fields[part].annotation
    return _models_in(annotation)


def _hint(model: type[BaseModel] | None, key: Key) -> str:
    field = model.model_fields.get(str(key[-1])) if model and key else None
    return f"  # {field.description}" if field and field.description else ""
