"""What every section of a recipe is: strict, frozen, without unknown keys."""

from __future__ import annotations

import json

import yaml
from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def recipe_yaml(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, every default written out."""
    raw = json.loads(recipe.model_dump_json())
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
