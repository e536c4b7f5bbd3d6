"""The benchmark that compares learning rates for a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.first_students import measure, rate_of

from tests import tiny

pytestmark = pytest.mark.run


def test_runs_with_different_learning_rates_share_the_untrained_student(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(json.dumps(tiny.recipe(tmp_path, train={"max_steps": 2})))
    slow, fast = (measure(recipe, tmp_path / "runs", [rate_of(rate)]) for rate in ("1e-6", "1e-2"))
    assert slow["models"]["untrained"] == fast["models"]["untrained"]
    assert slow["models"]["student"]["kl"] != fast["models"]["student"]["kl"]
    assert slow["seconds"]["student"] == fast["seconds"]["student"]
    assert set(slow["answers"]["the cat"]) == {"teacher", "untrained", "student"}
