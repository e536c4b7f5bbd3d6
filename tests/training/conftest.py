from dataclasses import dataclass
from pathlib import Path

import pytest

from stillhouse.data import Windows, build, open_windows
from stillhouse.recipe import parse_recipe
from tests import tiny


@dataclass(frozen=True)
class Setting:
    """A student and a teacher on disk, and windows of text."""

    student: Path
    teacher: Path
    windows: Windows
    heldout: Windows


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("setting")
    recipe = parse_recipe(tiny.recipe(folder))
    build(recipe.data, tiny.tokenizer(), seed=0, base=folder, out=folder / "data")
    student = tiny.save_model(folder / "student", seed=1, intermediate_size=48)
    return Setting(
        student,
        folder / "teacher",
        open_windows(folder / "data" / "train"),
        open_windows(folder / "data" / "heldout"),
    )
