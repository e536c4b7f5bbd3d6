"""A stage is complete or absent and runs only once; one process at a time uses a run folder."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.disk_errors import disk_errors
from stillhouse.errors import ModelError, RunError, StoreError
from stillhouse.runfolder import Outcome, RunFolder, StagePlan


def writes(text: str, calls: list[str]) -> Callable[[Path], Outcome]:
    def work(out: Path) -> Outcome:
        calls.append(text)
        (out / "result.txt").write_text(text)
        return Outcome(tokens=7, summary={"text": text})

    return work


def no_work(out: Path) -> Outcome:
    return Outcome()


def test_a_finished_stage_does_not_run_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    calls: list[str] = []
    first = folder.stage(StagePlan("data", {"a": 1}, writes("x", calls)))
    second = folder.stage(StagePlan("data", {"a": 1}, writes("x", calls)))
    assert calls == ["x"]
    assert (first.reused, second.reused) == (False, True)
    assert (first.digest, first.cost, first.summary) == (second.digest, second.cost, second.summary)


def test_a_changed_input_makes_a_new_stage_and_keeps_the_old_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    calls: list[str] = []
    folder.stage(StagePlan("data", {"a": 1}, writes("x", calls)))
    folder.stage(StagePlan("data", {"a": 2}, writes("y", calls)))
    folder.stage(StagePlan("data", {"a": 1}, writes("x", calls)))
    assert calls == ["x", "y"]


def test_the_digest_depends_on_the_content_not_on_the_inputs(tmp_path: Path) -> None:
    """So touching a source file without changing it does not repeat the stages that follow."""
    folder = RunFolder(tmp_path)
    same = [folder.stage(StagePlan("data", {"mtime": t}, writes("x", []))).digest for t in (1, 2)]
    other = folder.stage(StagePlan("data", {"mtime": 3}, writes("z", []))).digest
    assert same[0] == same[1] != other


def test_work_that_fails_leaves_no_stage(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def breaks(out: Path) -> Outcome:
        (out / "result.txt").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        folder.stage(StagePlan("data", {}, breaks))
    assert folder.finished(StagePlan("data", {}, no_work)) is None
    calls: list[str] = []
    folder.stage(StagePlan("data", {}, writes("whole", calls)))
    assert calls == ["whole"]


def test_only_a_resumable_stage_sees_what_a_killed_one_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("plain", "resumable"):
        folder.partial(StagePlan(name, {}, no_work)).mkdir(parents=True)
        (folder.partial(StagePlan(name, {}, no_work)) / "left.txt").write_text("left")
    seen = {}

    def look(name: str) -> Callable[[Path], Outcome]:
        def work(out: Path) -> Outcome:
            seen[name] = (out / "left.txt").exists()
            return Outcome()

        return work

    folder.stage(StagePlan("plain", {}, look("plain")))
    folder.stage(StagePlan("resumable", {}, look("resumable"), resumable=True))
    assert seen == {"plain": False, "resumable": True}


def test_a_kill_while_files_are_hashed_or_flushed_keeps_the_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(out: Path) -> Outcome:
        (out / "result.txt").touch()
        (out / "steps").mkdir(exist_ok=True)
        (out / "steps" / f"{len(list((out / 'steps').iterdir()))}").touch()
        return Outcome(summary={"steps": len(list((out / "steps").iterdir()))})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path)
    options: dict[str, Any] = {"resumable": True, "scratch": ("steps",)}
    for name in ("facts_of_files", "flush_tree"):
        with monkeypatch.context() as patch:
            patch.setattr(f"stillhouse.runfolder.{name}", killed)
            with pytest.raises(KeyboardInterrupt):
                folder.stage(StagePlan("train", {}, work, **options))
    stage = folder.stage(StagePlan("train", {}, work, **options))
    assert stage.summary == {"steps": 3}
    assert sorted(path.name for path in stage.path.iterdir()) == ["manifest.json", "result.txt"]


def test_half_written_files_of_a_killed_process_are_not_part_of_a_resumed_stage(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    left = folder.partial(StagePlan("train", {}, no_work))
    (left / "model" / ".part-abc").mkdir(parents=True)
    for name in (".manifest.json.tmp", "model/.part-abc/weights", "shard", ".shard-2.partial"):
        (left / name).write_text("half")
    stage = folder.stage(StagePlan("train", {}, writes("whole", []), resumable=True))
    files = {str(path.relative_to(stage.path)) for path in stage.path.rglob("*")}
    assert files == {"manifest.json", "result.txt", "model", "shard"}


def test_a_stage_that_fails_its_check_is_not_finished_and_keeps_its_scratch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def work(out: Path) -> Outcome:
        (out / "checkpoints").mkdir(exist_ok=True)
        (out / "checkpoints" / "state.bin").write_bytes(b"state")
        return Outcome()

    def lacks_weights(out: Path) -> None:
        assert (out / "checkpoints").is_dir()
        raise ModelError("weights are missing", where=out / "model")

    options: dict[str, Any] = {"resumable": True, "scratch": ("checkpoints",)}
    with pytest.raises(RunError, match="did not write a usable result: weights are"):
        folder.stage(StagePlan("train", {}, work, check=lacks_weights, **options))
    assert folder.finished(StagePlan("train", {}, no_work)) is None
    assert (folder.partial(StagePlan("train", {}, no_work)) / "checkpoints" / "state.bin").exists()
    stage = folder.stage(StagePlan("train", {}, work, check=lambda out: None, **options))
    assert not (stage.path / "checkpoints").exists()


@pytest.mark.parametrize("damage", ["truncate", "delete", "flip", "manifest", "digest", "list"])
def test_a_damaged_stage_runs_again(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    calls: list[str] = []
    path = folder.stage(StagePlan("data", {}, writes("hello", calls))).path
    if damage == "truncate":
        (path / "result.txt").write_text("he")
    elif damage == "delete":
        (path / "result.txt").unlink()
    elif damage == "flip":
        (path / "result.txt").write_text("hellO")
    elif damage == "digest":
        manifest = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(manifest.replace('"digest": "', '"digest": "0'))
    elif damage == "list":
        (path / "manifest.json").write_text("[]")
    else:
        (path / "manifest.json").write_text("{")
    assert not folder.stage(StagePlan("data", {}, writes("hello", calls))).reused
    assert calls == ["hello", "hello"]


def test_damage_that_is_found_when_a_file_is_read_makes_its_stage_run_again(tmp_path: Path) -> None:
    """Only the size of such a file is compared before its stage is used."""
    folder = RunFolder(tmp_path)
    calls: list[str] = []
    options: dict[str, Any] = {"compared_when_read": ("*.txt",)}
    path = folder.stage(StagePlan("signals", {}, writes("hello", calls), **options)).path
    (path / "result.txt").write_text("hellO")

    def read(out: Path) -> Outcome:
        raise StoreError("the shard is damaged", where=path / "result.txt", fix="delete it")

    again = RunFolder(tmp_path)
    assert again.stage(StagePlan("signals", {}, writes("hello", calls), **options)).reused
    with pytest.raises(RunError, match="the shard is damaged") as caught:
        again.stage(StagePlan("train", {}, read))
    assert "same command again" in str(caught.value.fix)
    third = RunFolder(tmp_path)
    assert not third.stage(StagePlan("signals", {}, writes("hello", calls), **options)).reused
    with pytest.raises(StoreError, match="the shard is damaged"):  # no file of this run is damaged
        third.stage(StagePlan("train", {}, read))
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "result.txt"]


def test_the_manifest_lists_inputs_and_outputs(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).stage(StagePlan("data", {"a": 1}, writes("x", []))).path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["depends_on"] == {"a": 1, "version": 1}
    assert manifest["files"]["result.txt"]["bytes"] == 1
    assert manifest["cost"]["tokens"] == 7
    assert "torch" in manifest["versions"]


KILLED = """
import sys, time
from pathlib import Path
from stillhouse.runfolder import Outcome, RunFolder, StagePlan

def work(out):
    for i in range(200):
        (out / f"{i}.bin").write_bytes(bytes([i]) * 20_000)
        if i == 0: print("started", flush=True)
    return Outcome()

folder = RunFolder(Path(sys.argv[1]))
with folder.locked():
    folder.stage(StagePlan("data", {}, work))
print("finished", flush=True)
"""


@pytest.mark.run
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.1])
def test_a_kill_at_any_time_leaves_a_complete_stage_or_none(tmp_path: Path, delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = RunFolder(tmp_path).finished(StagePlan("data", {}, no_work))
    if done is not None:
        assert len(list(done.path.glob("*.bin"))) == 200
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True)
    done = RunFolder(tmp_path).finished(StagePlan("data", {}, no_work))
    assert done is not None
    assert len(list(done.path.glob("*.bin"))) == 200


@pytest.mark.run
def test_the_second_process_stops_with_a_clear_error(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked():
        script = (
            "import sys; from pathlib import Path; from stillhouse.runfolder import RunFolder\n"
            "with RunFolder(Path(sys.argv[1])).locked(): pass"
        )
        second = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True
        )
    assert second.returncode != 0
    assert f"another process is using this run folder (process {os.getpid()}" in second.stderr
    with RunFolder(tmp_path).locked():
        pass


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("Error while serializing: No space left (os error 28)"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write here"),
    ],
)
def test_a_full_disk_or_a_missing_permission_is_one_clear_error(
    tmp_path: Path, failure: Exception, expected: str
) -> None:
    def fails(out: Path) -> Outcome:
        raise failure

    with pytest.raises(RunError, match=expected):
        RunFolder(tmp_path).stage(StagePlan("data", {}, fails))


def test_a_file_in_place_of_the_run_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("I am a file")
    with pytest.raises(RunError, match="cannot write here"), RunFolder(tmp_path / "run").locked():
        pass


def test_a_link_points_to_the_newest_stage(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for text in ("old", "new"):
        stage = folder.stage(StagePlan("export", {"text": text}, writes(text, [])))
        folder.point("model", stage.path)
    assert (tmp_path / "model" / "result.txt").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_users_file_is_not_replaced_by_a_link(tmp_path: Path, kind: str) -> None:
    folder = RunFolder(tmp_path)
    stage = folder.stage(StagePlan("data", {}, writes("x", [])))
    mine = tmp_path / "model"
    mine.mkdir() if kind == "folder" else mine.write_text("mine")
    with pytest.raises(RunError, match="that this run did not write is in the way of its model"):
        folder.point("model", stage.path)
    assert mine.is_dir() if kind == "folder" else mine.read_text() == "mine"


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at inline_container.cc:664] . unexpected pos 1280 vs 1174",
        "PytorchStreamWriter failed writing file data/3: file write failed",
        "Error while serializing: I/O error: No space left on device (os error 28)",
    ],
)
def test_a_full_disk_is_recognized_in_the_messages_of_libraries(tmp_path: Path, said: str) -> None:
    with pytest.raises(RunError, match="the disk is full"), disk_errors(tmp_path):
        raise RuntimeError(said)


def test_a_resumed_stage_keeps_hidden_files_of_its_checkpoints(tmp_path: Path) -> None:
    """A sharded checkpoint has a `.metadata`, without which it cannot be loaded."""
    folder = RunFolder(tmp_path)
    kept = Path("checkpoints") / "checkpoint-2" / ".metadata"

    def killed(out: Path) -> Outcome:
        (out / kept).parent.mkdir(parents=True)
        (out / kept).touch()
        (out / ".model.tmp").touch()
        raise KeyboardInterrupt

    def resumed(out: Path) -> Outcome:
        assert (out / kept).exists()
        assert not (out / ".model.tmp").exists()
        return Outcome()

    options: dict[str, Any] = {"resumable": True, "scratch": ("checkpoints",)}
    with pytest.raises(KeyboardInterrupt):
        folder.stage(StagePlan("train", {}, killed, **options))
    assert not list(folder.stage(StagePlan("train", {}, resumed, **options)).path.iterdir())[1:]
