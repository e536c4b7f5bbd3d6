"""Nodes that do not see the main process's run folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillhouse.errors import RunError
from stillhouse.pipeline.shared_folder import ANNOUNCEMENT, announce_run, wait_for_run


@pytest.fixture(autouse=True)
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")


def test_a_folder_that_all_nodes_share(tmp_path: Path) -> None:
    announce_run(tmp_path)
    wait_for_run(tmp_path, patience=0)


def missing(folder: Path) -> str:
    with pytest.raises(RunError, match="does not see the run folder") as caught:
        wait_for_run(folder, patience=0)
    return str(caught.value)


def test_a_folder_of_this_node_alone(tmp_path: Path) -> None:
    assert "a disk that all nodes share" in missing(tmp_path / "elsewhere")


def test_what_another_or_an_earlier_torchrun_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce_run(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    missing(tmp_path)
    announce_run(tmp_path)
    os.utime(tmp_path / ANNOUNCEMENT, (0, 0))
    missing(tmp_path)
