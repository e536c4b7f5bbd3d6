"""What recipes of every kind have."""

from __future__ import annotations

from pydantic import Field

from stillhouse.field_types import PathText, RunName, Seed
from stillhouse.section import Section


class RunRecipe(Section):
    """The name of a run, its folder, and the seed of all that is drawn."""

    name: RunName
    folder: PathText | None = Field(None, description="The run folder; null: runs/NAME.")
    seed: Seed = 0
