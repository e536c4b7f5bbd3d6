"""A tiny student, teacher, and text that all tests of training share."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from stillhouse.data.batches import Batches
from stillhouse.data.build_data import build
from stillhouse.data.windows import open_windows
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.local_teacher import LocalTeacher
from tests import tiny


@dataclass(frozen=True)
class Setting:
    """A student and a teacher on disk, and windows of training and held-out text."""

    student: Path
    teacher: Path | None
    windows: Batches
    heldout: Batches

    def load_teacher(self) -> LocalTeacher | None:
        if self.teacher is None:
            return None
        return LocalTeacher(load_model(self.teacher, dtype=torch.float32), source=self.teacher)


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("setting")
    recipe = tiny.parsed(tiny.recipe(folder))
    build(recipe.data, tiny.tokenizer(), seed=0, base=folder, out=folder / "data")
    student = tiny.save_model(folder / "student", seed=1, intermediate_size=48)
    return Setting(
        student,
        folder / "teacher",
        open_windows(folder / "data" / "train"),
        open_windows(folder / "data" / "heldout"),
    )


@pytest.fixture(scope="session")
def narrow(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """`setting` with a student of a different width and depth."""
    folder = tmp_path_factory.mktemp("narrow")
    changes = {"hidden_size": 24, "num_hidden_layers": 2, "num_key_value_heads": 4}
    student = tiny.save_model(folder / "student", seed=1, **changes)
    return replace(setting, student=student)
