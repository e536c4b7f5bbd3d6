"""The base class of a recipe's sections: strict, frozen, and without unknown keys."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
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
        key = ".".join(map(str, problem["loc"])) or where
        near = difflib.get_close_matches(key, section.model_fields, 1)
        valid = f"use one of: {', '.join(section.model_fields)}"
        known = f"did you mean {near[0]}?" if near else valid
        unknown = problem["type"] == "extra_forbidden"
        what = f"there is no option {key}" if unknown else _invalid_value(key, problem)
        raise RecipeError(what, where=where, fix=known if unknown else None) from None


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
