"""Reading run folders while runs write to them, and what the live page shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.pipeline.run_progress import ProgressFile
from stillhouse.progress import Work
from stillhouse.runfolder import Outcome, StagePlan
from stillhouse.watch.live_page import index_part, remaining, run_part
from stillhouse.watch.watched_runs import WatchedRun, find_runs, read_run
from tests.watch import run_folders


def read(root: Path) -> WatchedRun:
    return read_run(root.name, root)


def training_run(root: Path) -> ProgressFile:
    """A run whose training has logged three steps."""
    run_folders.begun(root)
    file = ProgressFile(root, root)
    file.expect(root, ["data", "train", "evaluate", "report"])
    run_folders.record(file, "data", 2.0)
    run_folders.finish(root, "data")
    file.begin(root, "train", "train-key")
    run_folders.log_steps(run_folders.partial(root, "train"), 1, 3)
    return file


def test_a_folder_that_appears_later_is_found(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert find_runs(runs) == {}
    assert "There are no runs here yet" in index_part(runs)
    run_folders.begun(runs / "demo")
    (runs / "notes").mkdir()
    assert list(find_runs(runs)) == ["demo"]
    assert list(find_runs(runs / "demo")) == ["demo"]


def test_training_is_shown_with_its_curve_and_steps(tmp_path: Path) -> None:
    file = training_run(tmp_path / "demo")
    file.now.work = Work("train", 30, 120, "tokens", 10.0)
    file.write()
    run = read(tmp_path / "demo")
    assert (run.kind, run.teacher, run.state) == ("language model", "org/<teacher>", "running")
    (part,) = run.parts
    assert [step.state for step in part.steps] == ["done", "working", "waiting", "waiting"]
    (training,) = part.trainings
    assert training.metrics.parent.name == ".train-key.partial"
    page = run_part(run)
    assert "KL to the teacher" in page
    assert (
        "25%: 30 of 120 tokens, 3.00\N{NO-BREAK SPACE}tokens/s, 30\N{NO-BREAK SPACE}s left" in page
    )
    assert "Evaluation" not in page
    assert "org/&lt;teacher&gt;" in index_part(tmp_path)


def test_curves_grow_with_the_file_and_stay_when_the_stage_is_finished(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    file = training_run(root)
    pages = [run_part(read(root))]
    with (run_folders.partial(root, "train") / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "tok')  # a row that is being written
    pages.append(run_part(read(root)))
    assert pages[1] == pages[0]
    (run_folders.partial(root, "train") / "metrics.jsonl").unlink()
    run_folders.log_steps(run_folders.partial(root, "train"), 1, 8)
    run_folders.finish(root, "train")
    pages.append(run_part(read(root)))
    assert "800" in pages[2]
    assert "800" not in pages[1]
    file.close("stopped")
    assert read(root).state == "stopped"


def test_the_evaluation_and_the_report_are_shown_once_they_exist(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    file = training_run(root)
    step = file.begin(root, "evaluate", "evaluate-key")
    run_folders.write_evaluation(run_folders.partial(root, "evaluate"))
    assert read(root).parts[0].evaluation is None
    run_folders.finish(root, "evaluate")
    step.state = "done"
    file.write()
    (root / "report.html").write_text("<h1>Report</h1>")
    page = run_part(read(root))
    assert "KL to the teacher (nats/token)" in page
    assert "0.250" in page
    assert '<a href="report.html">' in page
    (root / "stages" / "evaluate-key" / "evaluation.json").write_text('{"models": [')
    assert "The evaluation cannot be read." in run_part(read(root))


def test_a_run_whose_process_ended_without_recording_it_is_shown_as_killed(tmp_path: Path) -> None:
    file = training_run(tmp_path / "demo")
    file.now.work = Work("train", 1, 2, "tokens", 1.0)
    file.now.process_began -= 3600
    file.write()
    run = read(tmp_path / "demo")
    assert (run.state, run.work) == ("killed", None)
    assert "Run the same command again to resume it." in run_part(run)


def test_a_run_without_a_progress_file_is_shown_from_its_manifests(tmp_path: Path) -> None:
    folder = run_folders.begun(tmp_path / "demo")
    for name in ("train", "data"):
        folder.stage(StagePlan(name, {"of": name}, lambda out: Outcome(seconds=4.0)))
    run = read(folder.root)
    assert {step.name: step.seconds for step in run.parts[0].steps} == {"data": 4.0, "train": 4.0}
    assert run.state == "unknown"
    (folder.root / "report.html").write_text("")
    assert read(folder.root).state == "finished"


@pytest.mark.parametrize("recipe", [b"", b"[1, 2]", b"a: [", b"\xff\xfe", b"task: 3\nteacher: no"])
def test_a_recipe_that_cannot_be_read_is_treated_as_missing(tmp_path: Path, recipe: bytes) -> None:
    run_folders.begun(tmp_path / "demo")
    (tmp_path / "demo" / "recipe.yaml").write_bytes(recipe)
    run = read(tmp_path / "demo")
    assert (run.kind, run.teacher) == ("language model", "")
    run_part(run)


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ({"task": {"kind": "classify"}}, "classify"),
        ({"task": {"kind": "extract"}}, "extract"),
        ({"cascade": {"hops": []}}, "family"),
        ({}, "language model"),
    ],
)
def test_the_kind_of_run_is_read_from_the_recipe(
    tmp_path: Path, recipe: dict[str, object], kind: str
) -> None:
    run_folders.begun(tmp_path / "demo", recipe)
    assert read(tmp_path / "demo").kind == kind


def test_texts_on_the_page_are_escaped(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    recipe = {"teacher": {"model": "<img src=x onerror=alert(1)>"}}
    run_folders.begun(root, recipe)
    file = ProgressFile(root, root)
    file.begin(root, "<script>1</script>", "train-key")
    file.close("failed", "<b>error</b>")
    for page in (run_part(read(root)), index_part(tmp_path)):
        assert "<script>" not in page
        assert "<b>" not in page
        assert "<img" not in page


def test_work_without_an_estimate_has_no_rate() -> None:
    assert remaining(Work("train", 0, 10, "texts", 3.0)) == "0%: 0 of 10 texts"
    assert remaining(Work("train", 12, 10, "texts", 3.0)).endswith("0\N{NO-BREAK SPACE}s left")
