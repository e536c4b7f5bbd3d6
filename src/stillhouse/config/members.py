"""A cascade's recipe taken apart: one plain recipe for each member."""

from __future__ import annotations

from pathlib import Path

from stillhouse.config.cascade_config import HopRecipe
from stillhouse.config.recipe import Recipe
from stillhouse.run_paths import run_root
from stillhouse.students.student_config import PrunedSizes, PrunedStudent

ORIGINAL = "teacher"
"""In train.teachers: the recipe's own."""


def member_recipe(recipe: Recipe, hop: HopRecipe, parent: Path | None = None) -> Recipe:
    """The recipe of one member, whose teacher is the recipe's.

    parent: the trained member before it; None for the first. A size that the hop leaves out is
    that of `student`. Members that are not shipped (`cascade.ship`) are not quantized.
    """
    cascade, student = recipe.cascade, recipe.student
    assert cascade is not None
    assert isinstance(student, PrunedStudent)
    named = PrunedSizes.model_fields.keys() - {"hidden_method"}
    changes = {name: getattr(hop, name) for name in named if getattr(hop, name) is not None}
    if hop.hidden_size is not None:
        changes["hidden_method"] = hop.hidden_method
    if parent is not None and cascade.start == "previous":
        changes["model"] = str(parent.absolute())
    train = recipe.train
    if hop.epochs is not None:
        train = train.model_copy(update={"epochs": hop.epochs})
    if parent is not None and cascade.teacher != "original":
        teachers = [str(parent.absolute())]
        if cascade.teacher == "both":
            teachers.insert(0, ORIGINAL)
        train = train.model_copy(update={"teachers": teachers})
    last = hop.name == cascade.hops[-1].name
    # One repository holds one model: the smallest.
    export = recipe.export if last else recipe.export.model_copy(update={"push_to_hub": None})
    quantize = recipe.quantize
    if cascade.ship == "last" and not last:
        export = export.model_copy(update={"formats": ["safetensors"]})
        quantize = None
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-{hop.name}",
            "folder": str(run_root(recipe)),
            "student": student.model_copy(update=changes),
            "train": train,
            "quantize": quantize,
            "export": export,
            "cascade": None,
        }
    )


def first_member(recipe: Recipe) -> Recipe:
    """The recipe itself, or its first member's, whose data and signals are those of all."""
    if recipe.cascade is None:
        return recipe
    return member_recipe(recipe, recipe.cascade.hops[0])
