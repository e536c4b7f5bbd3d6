"""The file that records a run's progress: what is written to it, and how it is read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from stillhouse.errors import RecipeError
from stillhouse.pipeline.run_progress import (
    PROGRESS,
    ProgressFile,
    expect_steps,
    read_progress,
    recorded,
    recorded_step,
)
from stillhouse.progress import Work, bar, observed
from stillhouse.runfolder import RunFolder
from tests.clocks import Clock
from tests.watch import run_folders


def names(root: Path) -> list[tuple[str, str]]:
    progress = read_progress(root)
    assert progress is not None
    return [(step.name, step.state) for part in progress.parts for step in part.steps]


def test_steps_are_waiting_then_working_and_then_reused_or_failed(tmp_path: Path) -> None:
    clock = Clock(now=100.0)
    file = ProgressFile(tmp_path, Path("recipes"), clock.time)
    file.expect(tmp_path, ["data", "student", "train"])
    run_folders.record(file, "data", 3.0, reused=True)
    step = file.begin(tmp_path, "student", "student-key")
    assert names(tmp_path) == [("data", "reused"), ("student", "working"), ("train", "waiting")]
    clock.now = 107.0
    file.end(step, None)
    progress = read_progress(tmp_path)
    assert progress is not None
    assert [one.seconds for one in progress.parts[0].steps] == [3.0, 7.0, 0.0]
    assert progress.parts[0].steps[1].state == "failed"
    assert progress.base == str(Path("recipes").resolve())


def test_an_unexpected_step_is_inserted_before_those_that_are_waiting(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path, tmp_path)
    file.expect(tmp_path, ["data", "vocabulary", "train"])
    for name in ("data", "vocabulary", "data", "train"):
        run_folders.record(file, name, 1.0)
    found = [name for name, _ in names(tmp_path)]
    assert found == ["data", "vocabulary", "data", "train"]


def test_each_member_of_a_family_is_a_separate_part(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path, tmp_path)
    for member in ("wide", "narrow"):
        file.expect(tmp_path / member, ["train"])
        file.begin(tmp_path / member, "train", f"train-{member}")
    progress = read_progress(tmp_path)
    assert progress is not None
    assert [part.folder for part in progress.parts] == ["wide", "narrow"]
    assert progress.parts[1].steps[0].folder == "train-narrow"


def test_work_is_written_at_most_once_a_second(tmp_path: Path) -> None:
    clock = Clock(now=50.0)
    file = ProgressFile(tmp_path, tmp_path, clock.time)
    for now, done in ((50.5, 1), (51.0, 2), (51.5, 3)):
        clock.now = now
        file.show(Work("train", done, 10, "tokens", 1.0))
    progress = read_progress(tmp_path)
    assert progress is not None
    assert progress.work == Work("train", 2, 10, "tokens", 1.0)
    file.close("finished")
    progress = read_progress(tmp_path)
    assert progress is not None
    assert (progress.state, progress.work) == ("finished", None)


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (None, "finished", ""),
        (RecipeError("no such key", where="train"), "failed", "no such key"),
        (ValueError("a bug"), "failed", "ValueError"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_the_file_records_how_a_run_ended(
    tmp_path: Path, error: BaseException | None, state: str, said: str
) -> None:
    def work() -> None:
        with recorded(RunFolder(tmp_path), tmp_path):
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    progress = read_progress(tmp_path)
    assert progress is not None
    assert (progress.state, progress.error) == (state, said)
    assert not progress.is_running()


def test_steps_of_a_recorded_run_are_in_its_file(tmp_path: Path) -> None:
    folder = run_folders.begun(tmp_path / "run")
    with recorded(folder, tmp_path):
        expect_steps(folder, ["data", "train"])
        with recorded_step(folder, "data", "data-key"), bar("reads", total=4) as advance:
            advance(1)
            assert names(folder.root)[0] == ("data", "working")
        progress = read_progress(folder.root)
        assert progress is not None
        assert progress.is_running()
    assert names(folder.root) == [("data", "failed"), ("train", "waiting")]  # no stage was added


@pytest.mark.parametrize(
    ("error", "state"), [(ValueError("a bug"), "failed"), (KeyboardInterrupt(), "stopped")]
)
def test_a_step_that_a_signal_ends_has_not_failed(
    tmp_path: Path, error: BaseException, state: str
) -> None:
    folder = run_folders.begun(tmp_path / "run")

    def work() -> None:
        with recorded(folder, tmp_path), recorded_step(folder, "data", "data-key"):
            raise error

    with pytest.raises(type(error)):
        work()
    assert names(folder.root) == [("data", state)]


def test_steps_of_a_run_that_is_not_recorded_are_not_written(tmp_path: Path) -> None:
    folder = run_folders.begun(tmp_path)
    expect_steps(folder, ["data"])
    with recorded_step(folder, "data", "data-key"):
        pass
    assert not (tmp_path / PROGRESS).exists()


def test_an_observer_sees_every_advance_of_a_bar() -> None:
    seen: list[Work] = []
    with observed(seen.append), bar("train", total=10, unit="texts") as advance:
        advance(3)
        advance(4)
    assert [(work.name, work.done, work.total, work.unit) for work in seen] == [
        ("train", done, 10, "texts") for done in (0, 3, 7)
    ]


def test_a_killed_run_is_not_running(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path, tmp_path)
    file.now.process_began -= 3600  # so this process is another one with the same PID
    file.write()
    progress = read_progress(tmp_path)
    assert progress is not None
    assert not progress.is_running()
    progress.pid = -1  # in a damaged file
    assert not progress.is_running()
    progress.host = "another machine"
    assert progress.is_running()


@pytest.mark.parametrize("size", [0, 1, 40, -1])
def test_an_incomplete_file_is_treated_as_missing(tmp_path: Path, size: int) -> None:
    file = ProgressFile(tmp_path, tmp_path)
    complete = json.dumps(asdict(file.now))
    (tmp_path / PROGRESS).write_text(complete[:size])
    assert read_progress(tmp_path) is None


def test_a_folder_that_cannot_be_written_does_not_stop_a_run(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "gone", tmp_path)
    run_folders.record(file, "data", 1.0)
    file.close("finished")
    assert not (tmp_path / "gone").exists()
