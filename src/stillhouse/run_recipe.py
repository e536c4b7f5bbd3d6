"""The keys that every kind of recipe has."""

from __future__ import annotations

from pydantic import Field

from stillhouse.field_types import PathText, RunName, Seed
from stillhouse.section import Section


class RunRecipe(Section):
    """The run's name, its folder, and the random seed."""

    name: RunName
    folder: PathText | None = Field(None, description="The run folder; null means runs/NAME.")
    seed: Seed = 0
