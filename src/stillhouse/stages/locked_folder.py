"""The folder that a recipe runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.config.load import recipe_yaml
from stillhouse.config.recipe import Recipe
from stillhouse.errors import RecipeError
from stillhouse.hardware import world_size
from stillhouse.run_paths import run_root
from stillhouse.runfolder import RunFolder, write_atomically


@contextmanager
def locked_folder(recipe: Recipe | ClassifyRecipe | AnsweringRecipe) -> Iterator[RunFolder]:
    """The recipe's run folder, this process's alone, with the resolved recipe in it.

    Raises RunError where another process has it.
    """
    folder = RunFolder(run_root(recipe))
    with folder.locked():
        write_atomically(folder.root / "recipe.yaml", recipe_yaml(recipe))
        yield folder


def refuse_torchrun() -> None:
    """RecipeError in one of several processes, where one does all."""
    if world_size() > 1:
        raise RecipeError(
            "a task's student is trained by one process",
            where="torchrun",
            fix="start it with `stillhouse run` alone",
        )
