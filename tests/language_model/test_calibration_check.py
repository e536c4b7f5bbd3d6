"""`check` warns of calibration text that is too short for a refit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.check import check_recipe
from stillhouse.finding import Finding
from stillhouse.language_model.calibration_check import ROWS_PER_NEURON
from tests import tiny

pytestmark = pytest.mark.run

KEPT = 32
ENOUGH = ROWS_PER_NEURON * KEPT


def warnings(folder: Path, student: dict[str, Any], **data: Any) -> list[Finding]:
    raw = tiny.recipe(folder, data=data)
    raw["student"] = {"start": "pruned", **student}
    return [one for one in check_recipe(raw) if one.topic == "calibration"]


def test_a_refit_needs_some_tokens_for_each_neuron(tmp_path: Path) -> None:
    few = {"ffn_size": KEPT, "calibration_tokens": ENOUGH - 1}
    (found,) = warnings(tmp_path, few)
    assert found.level == "warning"
    assert found.text.startswith(f"{ENOUGH - 1} calibration tokens are too few")
    assert f"raise student.calibration_tokens to at least {ENOUGH}" in str(found.fix)
    assert not warnings(tmp_path, {**few, "calibration_tokens": ENOUGH})


def test_the_text_may_be_shorter_than_the_calibration(tmp_path: Path) -> None:
    student = {"ffn_size": KEPT, "calibration_tokens": 10 * ENOUGH}
    (found,) = warnings(tmp_path, student, train_tokens=ENOUGH - 28)
    assert found.text.startswith(f"{ENOUGH - 28} calibration tokens")
    assert f"train on at least {ENOUGH} tokens" in str(found.fix)


@pytest.mark.parametrize(
    "student", [{"layers": 1}, {"ffn_size": KEPT, "refit": False}], ids=["layers", "no refit"]
)
def test_cuts_that_refit_no_neurons_have_no_warning(
    tmp_path: Path, student: dict[str, Any]
) -> None:
    assert not warnings(tmp_path, {**student, "calibration_tokens": 8})
