"""All kinds of runs, and the kind of a recipe."""

from __future__ import annotations

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.answering.answering_run import EXTRACT, GENERATE
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.classify.classify_run import CLASSIFY
from stillhouse.config.load_recipe import AnyRecipe
from stillhouse.family.family import FAMILY
from stillhouse.language_model.language_model import LANGUAGE_MODEL
from stillhouse.pipeline.kind import Kind

KINDS = (LANGUAGE_MODEL, FAMILY, CLASSIFY, EXTRACT, GENERATE)


def kind_of(recipe: AnyRecipe) -> Kind:
    if isinstance(recipe, ClassifyRecipe | AnsweringRecipe):
        return next(kind for kind in KINDS if kind.name == recipe.task.kind)
    return LANGUAGE_MODEL if recipe.cascade is None else FAMILY
