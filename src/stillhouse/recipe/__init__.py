"""One YAML file that says everything about one run."""

from stillhouse.recipe.load import load_recipe, parse_recipe, recipe_json_schema, recipe_yaml
from stillhouse.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "parse_recipe", "recipe_json_schema", "recipe_yaml"]
