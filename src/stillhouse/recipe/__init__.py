"""One YAML file that says everything about one run."""

from stillhouse.recipe.classify import ClassifyRecipe
from stillhouse.recipe.load import (
    load_any_recipe,
    load_recipe,
    parse_classify_recipe,
    parse_recipe,
    recipe_json_schema,
    recipe_yaml,
)
from stillhouse.recipe.schema import Recipe

__all__ = [
    "ClassifyRecipe",
    "Recipe",
    "load_any_recipe",
    "load_recipe",
    "parse_classify_recipe",
    "parse_recipe",
    "recipe_json_schema",
    "recipe_yaml",
]
