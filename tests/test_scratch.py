"""Temporary files do not outlive a run, however it ends."""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path

import pytest

from stillhouse.errors import RunError
from stillhouse.runfolder import RunFolder
from stillhouse.scratch import scratch_in, scratch_place, temporary_folder
from tests.forks import Fork


def test_temporary_files_of_a_run_are_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    with RunFolder(tmp_path / "run").locked():
        with temporary_folder("stillhouse-test-") as name:
            assert Path(name).parent == tmp_path / "run" / ".scratch"
        assert not Path(name).exists()
    assert not (tmp_path / "run" / ".scratch").exists()
    assert scratch_place() == Path(tempfile.gettempdir())


def test_tmpdir_is_used_if_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "large-disk"))
    for run in ("one", "other"):
        with RunFolder(tmp_path / run).locked():
            assert scratch_place().parent == tmp_path / "large-disk"
    assert list((tmp_path / "large-disk").iterdir()) == []


def test_an_unusable_tmpdir_is_an_error_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    with (
        pytest.raises(RunError, match="set TMPDIR to a writable folder"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass
    assert scratch_place() == Path(tempfile.gettempdir())


def hold(run: Path) -> None:
    with RunFolder(run).locked():
        (scratch_place() / "logits").write_bytes(b"large")
        time.sleep(600)


@pytest.mark.parametrize("chosen", ["", "large-disk"])
def test_the_main_process_deletes_what_other_processes_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    """The next run may have fewer processes."""
    monkeypatch.setenv("TMPDIR", chosen and str(tmp_path / chosen))
    monkeypatch.setenv("RANK", "3")
    with scratch_in(tmp_path / "run"):
        left = scratch_place() / "weights"
    left.parent.mkdir(parents=True)
    left.touch()
    monkeypatch.setenv("RANK", "2")
    with scratch_in(tmp_path / "run"):
        assert left.exists()
    monkeypatch.setenv("RANK", "0")
    with RunFolder(tmp_path / "run").locked():
        assert not left.parent.exists()


@pytest.mark.run
def test_the_next_run_deletes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    child = Fork(hold, tmp_path, environment={"TMPDIR": ""})
    left = tmp_path / ".scratch" / "logits"
    while not left.exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=60)
    assert left.exists()
    with RunFolder(tmp_path).locked():
        assert not left.exists()
