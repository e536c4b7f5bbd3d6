"""Processes of a torchrun that do and do not see the main process's run folder."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from stillhouse.launch import leads, process_index
from stillhouse.pipeline import shared_folder
from stillhouse.pipeline.shared_folder import ANNOUNCEMENT, joining, leading
from stillhouse.runfolder import RunFolder
from tests import forks

pytestmark = pytest.mark.run


def meet(folders: Sequence[Path]) -> None:
    """Work of each process. folders: the run folder of each."""
    shared_folder.PATIENCE_SECONDS = 0.5
    folder = RunFolder(folders[process_index()])
    with leading(folder.root, folder.locked()) if leads() else joining(folder.root):
        pass


def ends(folders: Sequence[Path]) -> list[tuple[int, str]]:
    """The exit status of each process, and its error."""
    processes = forks.ranks(len(folders), meet, folders, nodes=len(folders))
    return [(each.wait(timeout=120), each.errors().partition("Error: ")[2]) for each in processes]


def test_all_processes_start_in_a_shared_folder(tmp_path: Path) -> None:
    assert ends([tmp_path] * 3) == [(0, "")] * 3


def test_separate_folders_are_an_error_in_every_process(tmp_path: Path) -> None:
    """The separate folder contains the announcement of a different torchrun."""
    own = tmp_path / "own"
    own.mkdir()
    (own / ANNOUNCEMENT).write_text("of another torchrun")
    for status, error in ends([tmp_path / "shared", own, tmp_path / "shared"]):
        assert status == 1
        assert error.startswith("1 of 3 processes do not see the main process's run folder")
        assert f"process 1 on {platform.node()} in {own}" in error
        assert "a disk that all nodes share" in error


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "not a folder"])
def test_a_main_process_that_cannot_start_is_an_error_in_every_process(
    tmp_path: Path, locked: bool
) -> None:
    if not locked:
        tmp_path = tmp_path / "file"
        tmp_path.write_text("mine")
    with RunFolder(tmp_path).locked() if locked else nullcontext():
        for status, error in ends([tmp_path] * 2):
            assert status == 1
            expected = (
                "another process is using this run folder"
                if locked
                else "a file where a folder should be"
            )
            assert expected in error
