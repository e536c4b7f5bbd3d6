"""Turns pydantic's validation errors into one error with the line, the key, and a fix."""

from __future__ import annotations

import difflib
import typing

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stillhouse.config.recipe_yaml import Key, Lines, dotted
from stillhouse.errors import RecipeError, shown, shown_value
from stillhouse.section import Place, locate, models_in

SHOWN = 4
"""Maximum number of problems in one message."""


def described(
    error: ValidationError, lines: Lines, source: str, root: type[BaseModel]
) -> RecipeError:
    """Build one RecipeError from pydantic's errors. lines: the lines of keys; 0 for a key that an
    override set."""
    found: dict[Key, tuple[str, str]] = {}
    for problem in error.errors(include_url=False)[: 2 * SHOWN]:
        at = locate(problem, root)
        found.setdefault(at.key, _describe(problem, at))  # each type in a union reports an error
    first, (what, fix) = next(iter(found.items()))
    if len(found) > 1:
        what += "\n  also:  " + "; ".join(text for text, _ in list(found.values())[1:SHOWN])
    return RecipeError(what, where=place(first, lines, source), fix=fix)


def place(key: Key, lines: Lines, source: str) -> str:
    """The location of a key, or of the nearest key around it."""
    near = key
    while near and near not in lines:
        near = near[:-1]
    if near and lines[near] == 0:
        return f"--set {dotted(key)}"
    return f"{source}, line {lines[near]}" if near else source


def _describe(problem: ErrorDetails, at: Place) -> tuple[str, str]:
    """Describe one pydantic error: what is wrong, and what to do."""
    key, kind, given = at.key, problem["type"], problem["input"]
    name, last = dotted(key) or "recipe", dotted(key[-1:])
    about = at.field.description if at.field else None
    if kind == "extra_forbidden":
        valid = list(at.section.model_fields) if at.section else []
        near = difflib.get_close_matches(last, valid, n=1, cutoff=0.5)
        section = dotted(key[:-1]) or "the recipe"
        inside = _sections_with(last, at.section)
        fix = f"did you mean `{near[0]}`? " if near else "remove it. "
        if inside and not near:
            fix = f"it is a key of {' and '.join(inside)}: move it there. "
        return f"unknown key `{name}`", f"{fix}Valid keys of {section}: {', '.join(valid)}"
    if kind == "missing":
        return f"the key `{name}` is missing", f"add `{last}:`" + (f"  # {about}" if about else "")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _variant(problem, at, name)
    message = problem["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        message = "input should be a mapping of keys to values"
    what = f"`{name}`: {message[0].lower() + message[1:]}"
    if given is None:
        what += " (it is null)"
    elif not isinstance(given, dict | list) or not models_in(at.annotation):
        what += f" (it is {shown_value(given)})"
    return what, _way_out(at, last, about)


def _sections_with(key: str, section: type[BaseModel] | None) -> list[str]:
    """The subsections of a section that have this key."""
    fields = section.model_fields if section else {}
    return [
        f"`{name}`"
        for name, field in fields.items()
        if any(key in model.model_fields for model in models_in(field.annotation))
    ]


def _way_out(at: Place, last: str, about: str | None) -> str:
    """Suggest a fix from the key's description and its default."""
    field = at.field
    default = None if field is None or field.is_required() else field.get_default()
    if about:
        return f"{last}: {about}"
    if default is None or isinstance(default, BaseModel | list | dict):
        return "change it" if field is None or field.is_required() else "change it, or remove it"
    return f"change it, or remove it to use the default: {shown_value(default)}"


def _variant(problem: ErrorDetails, at: Place, name: str) -> tuple[str, str]:
    """Describe an error about a section that has several kinds and does not name a known one."""
    given, context = problem["input"], problem.get("ctx", {})
    tag = str(context.get("discriminator", "")).strip("'")
    kind = given.get(tag) if isinstance(given, dict) else None
    tags = [
        str(value)
        for model in models_in(at.annotation)
        for value in typing.get_args(model.model_fields[tag].annotation)
    ]
    near = difflib.get_close_matches(shown(kind), tags, n=1)
    fix = f"did you mean `{tag}: {near[0]}`? " if near else ""
    fix += f"set {tag} to one of: {', '.join(map(repr, tags))}"
    if kind is None:
        return f"`{name}` needs the key `{tag}`", fix
    return f"unknown {tag} {shown_value(kind)} in `{name}`", fix
