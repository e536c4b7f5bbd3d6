"""A family of students, pruned and distilled in turn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stillhouse.export.export_formats import FORMATS
from stillhouse.field_types import Epochs, LearningRate, RunName, Tokens
from stillhouse.section import Section
from stillhouse.students.student_config import PrunedSizes

RUN_FOLDER_NAMES = (
    "stages",
    "recipe.yaml",
    "model",
    "checkpoint",
    "report.html",
    "report.json",
    "signals",
    "synthesis",
    "family.html",
    "family.json",
)
"""Names in a run folder, besides the exported formats."""


class HopRecipe(PrunedSizes):
    """One member of a family: the sizes it keeps of the model before it, and how long it is
    trained."""

    name: RunName = Field(description="The member's folder.")
    epochs: Epochs | None = Field(None, description="As train.epochs, which it overrides.")


class FromScratchRecipe(Section):
    """The largest member's shape, trained from random weights under the same teacher."""

    tokens: Tokens = Field(description="Training tokens.")
    learning_rate: LearningRate = 1e-3


class CascadeRecipe(Section):
    """Prune, distill, prune again: each member is the start of the next smaller one."""

    hops: list[HopRecipe] = Field(min_length=1, description="The members, the largest first.")
    start: Literal["previous", "original"] = Field(
        "previous",
        description="What is pruned: the trained member before (a cascade), or always the "
        "teacher (one-shot).",
    )

    teacher: Literal["original", "previous", "both"] = Field(
        "original",
        description="What a member learns from: the recipe's teacher, the trained member before "
        "it, or the mean of both; the first member always from the teacher.",
    )

    ship: Literal["all", "last"] = Field(
        "all",
        description="Which members are quantized, and exported in `export.formats`: all of them, "
        "or the last, the others being plain checkpoints.",
    )

    from_scratch: FromScratchRecipe | None = Field(
        None,
        description="Also train the largest member's shape from random weights under the same "
        "teacher, and report its KL next to the member's; null: do not.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> CascadeRecipe:
        names = [hop.name for hop in self.hops]
        if len(set(names)) < len(names):
            raise ValueError("two hops have the same name")
        taken = {*RUN_FOLDER_NAMES, *FORMATS}
        for name in names:
            # Some file systems are case-insensitive.
            if name.lower() in taken:
                raise ValueError(f"a member's folder cannot be called {name}, as the run has that")
        return self
