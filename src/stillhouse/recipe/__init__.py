"""One YAML file that says everything about one run."""

from stillhouse.recipe.answering import AnsweringRecipe
from stillhouse.recipe.classify import ClassifyRecipe
from stillhouse.recipe.load import (
    AnyRecipe,
    load_any_recipe,
    load_recipe,
    parse_answering_recipe,
    parse_classify_recipe,
    parse_recipe,
    recipe_from_text,
    recipe_json_schema,
    recipe_yaml,
)
from stillhouse.recipe.paths import answers_path, run_root
from stillhouse.recipe.schema import Recipe

__all__ = [
    "AnsweringRecipe",
    "AnyRecipe",
    "ClassifyRecipe",
    "Recipe",
    "answers_path",
    "load_any_recipe",
    "load_recipe",
    "parse_answering_recipe",
    "parse_classify_recipe",
    "parse_recipe",
    "recipe_from_text",
    "recipe_json_schema",
    "recipe_yaml",
    "run_root",
]
