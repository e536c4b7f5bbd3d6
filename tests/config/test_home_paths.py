"""`~` in a path of a recipe is the home folder, whichever key has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.config.load_recipe import parse_recipe
from stillhouse.language_model.recipe import Recipe
from stillhouse.runfolder import run_root
from stillhouse.signals.signals_config import SignalsRecipe
from tests import tiny


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    raw = tiny.recipe(tmp_path, folder="~/runs/a b", signals={"store": "~/store"})
    raw["data"]["sources"] += [{"kind": "text", "path": "~/texts/**/*.txt"}]
    recipe = parse_recipe(raw)
    assert isinstance(recipe, Recipe)
    assert isinstance(recipe.signals, SignalsRecipe)
    assert run_root(recipe) == tmp_path / "home" / "runs" / "a b"
    assert recipe.signals.store == str(tmp_path / "home" / "store")
    assert recipe.data.sources[1].path == str(tmp_path / "home" / "texts/**/*.txt")
