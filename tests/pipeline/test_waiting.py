"""A long wait for the main process is reported once on each machine."""

from __future__ import annotations

from functools import partial

import pytest

from stillhouse.pipeline import shared_folder
from tests.clocks import Clock


class Sleeping(Clock):
    """A clock whose `sleep` returns at once."""

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("process", [0, 1, 2])
def test_the_first_process_after_the_main_one_reports_a_long_wait(
    process: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", process), ("LOCAL_RANK", process), ("WORLD_SIZE", 3)):
        monkeypatch.setenv(name, str(value))
    clock = Sleeping()
    monkeypatch.setattr(shared_folder, "time", clock)

    def finished_at(moment: float) -> bool | None:
        return True if clock.now >= moment else None

    for seconds in (59, 200):
        find = partial(finished_at, clock.now + seconds)
        assert shared_folder.wait_for_main_process(find, "the data stage")
        shown = capsys.readouterr().err
        expected = process == 1 and seconds > shared_folder.SILENT_SECONDS
        assert shown.count("waiting for the main process (the data stage)") == expected
