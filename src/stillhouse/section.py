"""What every section of a recipe is: strict, frozen, without unknown keys."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from pydantic_core import core_schema


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OneOf:
    """`Annotated[str, OneOf(NAMES)]`: one of the names of a registry, checked and described in the
    JSON schema as a `Literal` of them is."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema([*self.names])


def recipe_yaml(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, every default written out."""
    raw = json.loads(recipe.model_dump_json())
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
