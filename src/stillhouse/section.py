"""The base class of a recipe's sections: strict, frozen, and without unknown keys."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, core_schema

from stillhouse.errors import ModelError, RecipeError, StillhouseError, shown_value
from stillhouse.progress import note


class Section(BaseModel):
    """A section of a recipe.

    renamed: maps old key names to new ones. Old names work for one version, with a warning.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    renamed: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        found = {old: new for old, new in cls.renamed.items() if old in values}
        for old, new in found.items():
            if new in values:
                raise ValueError(f"`{old}` is the old name of `{new}`: remove it")
            note(f"warning: the key `{old}` is now called `{new}`; the old name will be removed")
        return {found.get(key, key): value for key, value in values.items()}


class OneOf:
    """Restricts a string to the names in a registry: `Annotated[str, OneOf(NAMES)]` is validated
    and appears in the JSON schema like a `Literal` of the names."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema([*self.names])


# --- sections in annotations, and the places of errors ---------------------------------------


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections in an annotation, through unions and lists."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for argument in typing.get_args(annotation) for m in models_in(argument)]


def tag_key(models: list[type[BaseModel]]) -> str | None:
    """The key that distinguishes the variants of a union: `kind` or `start`."""
    if len(models) < 2:
        return None
    return next(k for k in ("kind", "start") if all(k in m.model_fields for m in models))


def chosen_model(models: list[type[BaseModel]], raw: Mapping[Any, Any]) -> type[BaseModel] | None:
    """The variant of a union that the values select; None if they select none."""
    key = tag_key(models)
    if key is None:
        return models[0]
    by_tag = {tag: m for m in models for tag in typing.get_args(m.model_fields[key].annotation)}
    default = next((m for m in models if not m.model_fields[key].is_required()), None)
    if key not in raw:
        return default
    return by_tag.get(raw[key]) if isinstance(raw[key], str) else None


@dataclass(frozen=True)
class Place:
    """The place of an error. key: the key as it is written. section: the section that contains the
    key's last part. annotation: the value's type."""

    key: tuple[str | int, ...]
    section: type[BaseModel]
    annotation: Any

    @property
    def field(self) -> FieldInfo | None:
        return self.section.model_fields.get(str(self.key[-1])) if self.key else None


def locate(problem: ErrorDetails, root: type[BaseModel]) -> Place:
    """Find the place of an error from pydantic's location, which also names union variants."""
    key: list[str | int] = []
    section = root
    annotation: Any = root
    parts = problem["loc"]
    for place, part in enumerate(parts):
        if isinstance(part, int):
            key.append(part)
            continue
        models = models_in(annotation)
        tag = tag_key(models)
        chosen = chosen_model(models, {tag: part}) if tag else None
        if chosen is not None:
            annotation = chosen
        elif len(models) == 1 and part in models[0].model_fields:
            (section,) = models
            key.append(part)
            annotation = section.model_fields[part].annotation
        elif problem["type"] == "extra_forbidden" and place == len(parts) - 1:
            section = models[0] if len(models) == 1 else section
            key.append(part)
        elif not models and dict in _origins(annotation):
            key.append(part)
            annotation = typing.get_args(annotation)[-1]
    return Place(tuple(key), section, annotation)


def _origins(annotation: Any) -> set[Any]:
    origin = typing.get_origin(annotation)
    return {origin}.union(*map(_origins, typing.get_args(annotation) if origin is not dict else ()))


# --- arguments of functions ------------------------------------------------------------------

S = TypeVar("S", bound=BaseModel)


def made(section: type[S], values: Mapping[str, Any], where: str) -> S:
    """Build a section from keyword arguments.

    where: the name of the function or class that accepts them. Raises RecipeError for an unknown
    argument or an invalid value.
    """
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        at = locate(problem, section)
        key = ".".join(map(str, at.key)) or where
        if problem["type"] != "extra_forbidden":
            raise RecipeError(_invalid_value(key, problem), where=where) from None
        valid = list(at.section.model_fields)
        near = difflib.get_close_matches(str(at.key[-1]), valid, 1)
        known = f"did you mean {near[0]}?" if near else f"use one of: {', '.join(valid)}"
        raise RecipeError(f"there is no option {key}", where=where, fix=known) from None


def checked(kind: Any, value: Any, name: str) -> Any:
    """Validate a function's argument against a type from `field_types`. Raises RecipeError that
    names the argument."""
    try:
        return TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        raise RecipeError(_invalid_value(name, error.errors()[0])) from None


def require_type(
    given: object,
    kind: type[Any] | UnionType | tuple[type[Any], ...],
    name: str,
    expected: str,
    fix: str,
    error: type[StillhouseError] = ModelError,
) -> None:
    """Raise `error`, naming a function's argument and its type, unless the argument is an instance
    of `kind`. expected: `kind` in words."""
    if not isinstance(given, kind):
        raise error(_wrong_type(given, name, expected), fix=fix)


def require_tokenizer(given: Any) -> None:
    """Raise ModelError if a function's argument is not a tokenizer."""
    if not hasattr(given, "get_vocab"):  # without importing transformers
        raise ModelError(
            _wrong_type(given, "tokenizer", "a tokenizer of transformers"),
            fix="give that of a model, such as teacher.tokenizer, or "
            "AutoTokenizer.from_pretrained(...)",
        )


def _wrong_type(given: object, name: str, expected: str) -> str:
    return f"the {name} is a {type(given).__name__} instead of {expected}"


def _invalid_value(name: str, problem: ErrorDetails) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    message = f"{name}: {message[0].lower()}{message[1:]}"
    given = problem["input"]
    return message if isinstance(given, dict | list) else f"{message} (it is {shown_value(given)})"


def recipe_yaml(recipe: BaseModel) -> str:
    """Return the resolved recipe as YAML, with all defaults."""
    raw = json.loads(recipe.model_dump_json())
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
