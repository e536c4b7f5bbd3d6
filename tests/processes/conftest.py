"""Runs by one process, the reference for runs by several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forks import Fork
from tests.processes.process_runs import KINDS, MICRO_BATCHES, finish, recipe, run_all

SECONDS = 900


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and the text."""
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="session")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of run by one process, with micro-batches of each size."""
    folder = tmp_path_factory.mktemp("alone")
    recipes = [
        recipe(inputs, folder / f"{kind} {micro}", kind, micro_batch_size=micro, shard="both")
        for kind in KINDS
        for micro in MICRO_BATCHES
    ]
    finish([Fork(run_all, recipes)], SECONDS)
    return folder
