"""A full disk, a vanished folder, a read-only folder: one message that names the right place."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from stillhouse import scratch
from stillhouse.disk_errors import disk_errors
from stillhouse.errors import RunError
from stillhouse.runfolder import Outcome, RunFolder
from stillhouse.scratch import temporary_folder


class Usage(NamedTuple):
    free: int


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("in_temporary_folder", [True, False])
def test_the_error_names_the_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_temporary_folder: bool
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "tmp"
    monkeypatch.setenv("TMPDIR", str(elsewhere))

    def usage(path: Path) -> Usage:
        return Usage(0 if (elsewhere in path.parents) == in_temporary_folder else 10**9)

    def work(out: Path) -> Outcome:
        with temporary_folder("stillhouse-"):
            raise full()

    folder = RunFolder(run)
    with folder.locked():
        monkeypatch.setattr(scratch.shutil, "disk_usage", usage)
        with pytest.raises(RunError) as caught:
            folder.stage("export", {}, work)
    where = Path(str(caught.value.where))
    assert (elsewhere in where.parents) == in_temporary_folder
    assert ("TMPDIR" in str(caught.value.fix)) == in_temporary_folder


@pytest.mark.parametrize("library_makes_it_again", [True, False])
def test_a_run_folder_that_vanishes_is_one_message(
    tmp_path: Path, library_makes_it_again: bool
) -> None:
    def work(out: Path) -> Outcome:
        shutil.rmtree(tmp_path / "run")
        if library_makes_it_again:
            out.mkdir(parents=True)
        (out / "model").write_text("x")
        return Outcome()

    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(RunError, match="deleted, moved or replaced"):
        folder.stage("student", {}, work)
    assert not list((tmp_path / "run").glob("stages/student-*"))


def test_a_message_is_not_mistaken_for_another(tmp_path: Path) -> None:
    said = RunError("the disk is full", where="elsewhere")
    with pytest.raises(RunError) as caught, disk_errors(tmp_path):
        raise said
    assert caught.value is said
