"""The repository's extract and generate recipes, checked with a tiny teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.answering.answering_job import find_answering
from stillhouse.check import check_recipe
from stillhouse.config.load_recipe import load_recipe
from stillhouse.errors import RecipeError
from stillhouse.synthesis.filters import Row
from tests import tiny
from tests.answering import toys

RECIPES = Path(__file__).parents[2] / "recipes"


def overrides(folder: Path) -> list[str]:
    model = tiny.save_model(folder / "teacher", max_position_embeddings=4096)
    teacher = [f"teacher.model={model}", "teacher.license=apache-2.0"]
    return [*teacher, "student.layers=1", f"folder={folder / 'run'}"]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("extract", "360 to learn from, 75 to measure on"),
        ("generate", "290 to learn from, 60 to measure on"),
    ],
)
def test_check_reports_no_warning_or_error(tmp_path: Path, name: str, texts: str) -> None:
    found = check_recipe(RECIPES / f"{name}.yaml", overrides(tmp_path))
    assert [one for one in found if one.level in ("warning", "error")] == []
    assert texts in [one.text for one in found]


def test_the_examples_of_the_extract_recipe_match_its_schema(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "extract.yaml", overrides(tmp_path))
    assert isinstance(recipe, AnsweringRecipe)
    validity = find_answering(recipe, RECIPES).validity
    assert validity is not None
    problems = [validity(Row((), one.answer, None, "")) for one in recipe.task.examples]
    assert problems == [None] * 4


def test_a_teacher_answers_greedily_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    raw = toys.recipe(tmp_path, "generate")
    raw["teacher"]["sampling"] = {"max_tokens": 12}
    assert toys.parsed(raw).teacher.sampling.temperature == 0.0
    raw["teacher"]["samples"] = 2
    with pytest.raises(RecipeError, match=r"set sampling\.temperature"):
        toys.parsed(raw)
