"""Splits a cascade's recipe into one plain recipe per member."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stillhouse.errors import RecipeError
from stillhouse.language_model.job import Job
from stillhouse.language_model.recipe import HopRecipe, Recipe
from stillhouse.language_model.run_models import RunModels, run_models
from stillhouse.runfolder import run_root
from stillhouse.students.build_student import planned_config
from stillhouse.students.student_config import PrunedSizes, PrunedStudent
from stillhouse.teachers.load_model import load_config
from stillhouse.training.train_config import ORIGINAL


def member_recipe(recipe: Recipe, hop: HopRecipe, parent: Path | None = None) -> Recipe:
    """Return one member's recipe, with the cascade's teacher.

    parent: the trained member before it; None for the first. A size that the hop leaves out comes
    from `student`. Members that are not shipped (`cascade.ship`) are not quantized.
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
    # A repository contains a single model: the smallest.
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
    """Return the recipe itself, or its first member's, whose data and signals all members share."""
    if recipe.cascade is None:
        return recipe
    return member_recipe(recipe, recipe.cascade.hops[0])


def planned_members(recipe: Recipe, first: Job) -> list[tuple[str, Any]]:
    """Return the name and configuration of every member of a cascade. first: the first member's
    job.

    Raises RecipeError if a member cannot be cut as requested.
    """
    assert recipe.cascade is not None
    start = load_config(first.start)
    served = getattr(torch, recipe.export.dtype)
    largest, owner = start, None
    members = []
    for hop in recipe.cascade.hops:
        section = member_recipe(recipe, hop).student
        assert isinstance(section, PrunedStudent)
        plan = partial(planned_config, section, base=first.base, served=served, owner=owner)
        try:
            try:
                planned = plan(start)
            except RecipeError:
                # A searched member's shape is only estimated, so accept anything that the
                # largest possible shape allows.
                planned = plan(largest)
        except RecipeError as error:
            where = f"cascade.hops, {hop.name}"
            raise RecipeError(error.what, where=where, fix=error.fix) from None
        members.append((hop.name, planned))
        if recipe.cascade.start == "previous":
            start, owner = planned, hop.name
            if section.target is None:
                largest = planned
    return members


def planned_models(recipe: Recipe, first: Job) -> list[RunModels]:
    """Return the planned models of every student that the recipe makes. first: the first one's
    job."""
    models = run_models(first)
    if recipe.cascade is None:
        return [models]
    cascade, found = recipe.cascade, list[RunModels]()
    start, teachers = models.start, models.teachers
    for hop, (name, config) in zip(cascade.hops, planned_members(recipe, first), strict=True):
        member = replace(
            models,
            recipe=member_recipe(recipe, hop),
            student=config,
            start=start,
            teachers=teachers,
            member=name,
            first=not found,
        )
        found.append(member)
        if cascade.start == "previous":
            start = config
        if cascade.teacher != "original":
            teachers = (config,) if cascade.teacher == "previous" else (models.teacher, config)
    return found
