"""Locks on folders, including those of killed processes and those on disks without locks."""

from __future__ import annotations

import errno
import fcntl
import signal
import time
from pathlib import Path

import pytest

from stillhouse import file_locks
from stillhouse.errors import RunError
from stillhouse.file_locks import building_folder, locked_while_writing, try_lock
from tests.forks import Fork


def test_a_folder_is_locked_until_the_block_ends(tmp_path: Path) -> None:
    with (
        locked_while_writing(tmp_path / "new", "store"),
        pytest.raises(RunError, match="another process is writing this store"),
        locked_while_writing(tmp_path / "new", "store"),
    ):
        pass
    with locked_while_writing(tmp_path / "new", "store"):
        pass


def test_a_file_in_place_of_the_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match="there is a file where a folder should be"),
        locked_while_writing(tmp_path / "file", "store"),
    ):
        pass


def _build(path: Path) -> None:
    with building_folder(path) as folder:
        (folder / "weights").write_bytes(b"part")
        time.sleep(600)


@pytest.mark.run
def test_the_unfinished_folder_of_a_killed_process_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "model"
    users = tmp_path / ".model.txt"
    users.write_text("a file")
    process = Fork(_build, path)
    while not list(tmp_path.glob(".model.*/weights")):
        time.sleep(0.01)
    with building_folder(path) as own:
        assert len([p for p in tmp_path.glob(".model.*") if p.is_dir()]) == 2, "it is in use"
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    with building_folder(path) as own:
        assert [p for p in tmp_path.glob(".model.*") if p.is_dir()] == [own]
        own.rename(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.txt", "model"]


def test_a_disk_without_locks_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(_file: object, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    file_locks._warn_once.cache_clear()
    with (tmp_path / "file").open("w") as file:
        assert try_lock(file)
        assert try_lock(file)
    assert capsys.readouterr().err.count("this disk does not support file locks") == 1
    left = tmp_path / f".model.{'0' * 32}"
    left.mkdir()
    with building_folder(tmp_path / "model"):
        assert left.is_dir(), "another process may be writing it"
