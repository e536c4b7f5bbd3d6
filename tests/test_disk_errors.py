"""A full disk, a vanished folder, or a read-only folder is one error that names the right place."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import yaml

from stillhouse.atomic_files import write_atomically
from stillhouse.disk_errors import disk_errors
from stillhouse.errors import RunError
from stillhouse.evaluation.results import Evaluation
from stillhouse.pipeline import engine
from stillhouse.pipeline.engine import RESOLVED, locked_folder
from stillhouse.plan import RunPlan
from stillhouse.planning.machine import Machine
from stillhouse.planning.stage_estimate import StageEstimate
from stillhouse.planning.step_memory import Memory
from stillhouse.runfolder import Outcome, RunFolder, StagePlan
from stillhouse.scratch import temporary_folder
from tests import forks, tiny


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
        monkeypatch.setattr(shutil, "disk_usage", usage)
        with pytest.raises(RunError) as caught:
            folder.stage(StagePlan("export", {}, work))
    where = Path(str(caught.value.where))
    assert (elsewhere in where.parents) == in_temporary_folder
    assert ("TMPDIR" in str(caught.value.fix)) == in_temporary_folder


@pytest.mark.parametrize("library_recreates_it", [True, False])
def test_a_run_folder_that_vanishes_is_one_error(
    tmp_path: Path, library_recreates_it: bool
) -> None:
    def work(out: Path) -> Outcome:
        shutil.rmtree(tmp_path / "run")
        if library_recreates_it:
            out.mkdir(parents=True)
        (out / "model").write_text("x")
        return Outcome()

    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(RunError, match="deleted, moved, or replaced"):
        folder.stage(StagePlan("student", {}, work))
    assert not list((tmp_path / "run").glob("stages/student-*"))
    assert not list((tmp_path / "run").rglob(".*.partial"))


def test_a_deleted_lock_file_costs_no_checkpoints(tmp_path: Path) -> None:
    def work(out: Path) -> Outcome:
        (out / "checkpoint").touch()
        (tmp_path / "run" / ".lock").unlink()
        return Outcome()

    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(RunError, match="deleted, moved, or replaced"):
        folder.stage(StagePlan("train", {}, work, resumable=True))
    assert list((tmp_path / "run").glob("stages/.train-*.partial/checkpoint"))


def test_a_clear_error_is_passed_on_unchanged(tmp_path: Path) -> None:
    said = RunError("the disk is full", where="elsewhere")
    with pytest.raises(RunError) as caught, disk_errors(tmp_path):
        raise said
    assert caught.value is said


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota is used up", "free some space"),
        (Exception("Error: Disk quota exceeded (os error 122)"), "quota", "free some space"),
        (shutil.Error([("a", "b", "[Errno 27] File too large")]), "larger than", "free some space"),
        (OSError(errno.EFBIG, "File too large"), "larger than the disk", "free some space"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "full", "free some space"),
        (OSError(errno.EIO, "Input/output error"), "reports an error", "check the disk"),
        (OSError(errno.ESTALE, "Stale file handle"), "no longer connected", "check the disk"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only", "use another path"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "x"),
            "a folder where",
            "move it out of the way",
        ),
        (
            FileExistsError(errno.EEXIST, "File exists", "x"),
            "a file where",
            "move it out of the way",
        ),
    ],
)
def test_every_error_of_a_disk_is_explained(
    tmp_path: Path, error: Exception, what: str, fix: str
) -> None:
    with pytest.raises(RunError, match=what) as caught, disk_errors(tmp_path):
        raise error
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no space"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "teacher/config.json"),
        RuntimeError("PytorchStreamReader failed finding central directory"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    ],
)
def test_other_errors_are_passed_on_unchanged(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_failed_rename_names_the_path_that_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / "new").touch()
    with pytest.raises(RunError, match="a folder where a file") as caught, disk_errors(tmp_path):
        (tmp_path / "new").replace(tmp_path / "report.html")
    assert caught.value.where == str(tmp_path / "report.html")


def test_a_finished_stage_that_vanishes_is_one_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        first = folder.stage(StagePlan("data", {}, lambda out: Outcome()))

        def work(out: Path) -> Outcome:
            shutil.rmtree(first.path)
            raise ValueError("in the words of a library")

        with pytest.raises(RunError, match="deleted, moved, or replaced") as caught:
            folder.stage(StagePlan("train", {}, work))
    assert caught.value.where == str(first.path)


def test_a_stage_that_runs_again_is_not_reported_as_vanished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        shutil.rmtree(folder.stage(StagePlan("data", {}, lambda out: Outcome())).path)
        with pytest.raises(ValueError, match="of the work"):
            folder.stage(StagePlan("data", {}, raise_in_work))


def raise_in_work(out: Path) -> Outcome:
    raise ValueError("of the work")


def test_a_file_in_place_of_a_stage_is_found_before_the_work(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        stage = folder.stage(StagePlan("data", {}, lambda out: Outcome()))
        shutil.rmtree(stage.path)
        stage.path.write_text("mine")
        with pytest.raises(RunError, match="a file where a folder should be"):
            folder.stage(StagePlan("data", {}, raise_in_work))
    assert stage.path.read_text() == "mine"


@pytest.mark.parametrize("place", [".scratch", "tmp"])
def test_a_file_in_place_of_the_temporary_folder_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TMPDIR", "" if place == ".scratch" else str(tmp_path / "tmp"))
    run.mkdir()
    (run / ".scratch").write_text("mine")
    (tmp_path / "tmp").write_text("mine")
    with pytest.raises(RunError, match="a file where") as caught, RunFolder(run).locked():
        temporary_folder("stillhouse-").__enter__()
    assert "TMPDIR" in str(caught.value.fix)


class FakeRecipe(SimpleNamespace):
    """Stands in for a recipe of any kind; only its name and folder matter."""


def test_the_users_recipe_in_the_run_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "recipe_yaml", lambda recipe: "name: tiny\n")
    recipe = FakeRecipe(name="tiny", folder=str(tmp_path))
    file = tmp_path / "recipe.yaml"
    file.write_text("# mine\nname: tiny\n")
    with pytest.raises(RunError, match=r"recipe\.yaml"), locked_folder(recipe):
        pass
    assert file.read_text() == "# mine\nname: tiny\n"
    file.unlink()
    for _ in range(2):
        with locked_folder(recipe):
            assert file.read_text() == f"{RESOLVED}name: tiny\n"


@pytest.mark.run
def test_a_folder_in_place_of_the_final_model_is_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.recipe(tmp_path)))
    process = forks.stillhouse("run", str(recipe))
    assert process.wait(timeout=120) == 1
    assert "in the way of its model" in process.errors()
    assert not os.listdir(tmp_path / "run" / "stages")


def test_a_disk_that_is_too_full_for_the_lock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.runfolder.os.write", raise_full)
    with pytest.raises(RunError, match="the disk is full") as caught:
        RunFolder(tmp_path / "run").locked().__enter__()
    assert caught.value.where == str(tmp_path / "run")


def raise_full(*_: object) -> int:
    raise full()


def test_a_folder_that_cannot_be_written_to_is_named() -> None:
    path = Path("/proc/report.html")
    with pytest.raises(RunError, match="cannot write here: permission denied") as caught:
        write_atomically(path, "text")
    assert caught.value.where == str(path)


@pytest.mark.parametrize("what", ["plan", "evaluation"])
def test_a_failed_write_of_figures_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "figures.json"
    path.write_text("previous figures")
    monkeypatch.setattr("stillhouse.runfolder.os.fsync", raise_full)
    stage = StageEstimate("data", Memory("data", {}))
    plan = RunPlan(Machine("cuda", 80e9), 0, (), (stage,))
    figures = plan if what == "plan" else Evaluation([], [])
    with pytest.raises(RunError, match="the disk is full"):
        figures.save(path)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_text() == "previous figures"


def test_a_pipe_is_written_directly(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(path, "figures")
    assert os.read(reader, 100) == b"figures"
    os.close(reader)
    assert path.is_fifo()
