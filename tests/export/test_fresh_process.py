"""Errors of a script that runs in a separate process."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import ModelError, RunError
from stillhouse.export import fresh_process
from stillhouse.export.fresh_process import run_script


def ending_with(last_line: str, status: int = 1) -> Any:
    class Module:
        @staticmethod
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(command, status, "", f"Traceback\n{last_line}\n")

    return Module


def replayed() -> None:
    run_script("replay.py", {}, what="not loaded", where=Path("m"), fix="check it")


@pytest.mark.parametrize(
    "last_line",
    [
        "OSError: [Errno 28] No space left on device",
        "SafetensorError: I/O error: No space left on device (os error 28)",
    ],
)
def test_a_full_disk_is_not_reported_as_a_fault_of_the_export(
    monkeypatch: pytest.MonkeyPatch, last_line: str
) -> None:
    monkeypatch.setattr(fresh_process, "subprocess", ending_with(last_line))
    with pytest.raises(RunError, match="the disk is full") as caught:
        replayed()
    assert "TMPDIR" in str(caught.value.fix)


def test_the_error_for_a_killed_process_names_the_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fresh_process, "subprocess", ending_with("Loading: 100%", status=-9))
    with pytest.raises(ModelError, match="SIGKILL, most likely because memory ran out"):
        replayed()


def test_the_error_contains_the_last_line_of_the_scripts_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fresh_process, "subprocess", ending_with("KeyError: 'head'"))
    with pytest.raises(ModelError, match=r"not loaded \(KeyError: 'head'\)"):
        replayed()
