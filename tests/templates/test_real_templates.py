"""What is learned through the chat templates of real models: see README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.templates.real_templates import CHATS, FOLDER, GOLDEN, MODELS, facts, find_template

EXPECTED = json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_every_model_has_golden_values() -> None:
    assert EXPECTED.keys() == MODELS.keys()
    assert all(CHATS.keys() < found.keys() for found in EXPECTED.values())


@pytest.mark.skipif(not FOLDER, reason="STILLHOUSE_TEMPLATES names no folder")
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_mask_and_the_end_of_a_turn(name: str) -> None:
    file = find_template(MODELS[name].source, Path(FOLDER))
    if file is None:
        pytest.skip(f"{FOLDER} has no {MODELS[name].source} ({name})")
    assert facts(name, file) == EXPECTED[name]
