"""Where a run's folder is, and what all runs beside it share; of every kind of recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Named(Protocol):
    """A recipe, as far as its folder goes."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> str | None: ...


def run_root(recipe: Named) -> Path:
    """The run folder's path."""
    return Path(recipe.folder or Path("runs") / recipe.name)


def answers_path(recipe: Named) -> Path:
    """The journal of paid answers, which all runs of one place share."""
    return run_root(recipe).parent / "answers.sqlite"
