"""Runs of tasks by two processes have the scores, answers, and weights of runs by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import stillhouse
from stillhouse.classify import label_judgment
from stillhouse.export import fresh_process
from stillhouse.launch import process_index
from tests import forks, replays
from tests.answering import toys as answering
from tests.classify import toys as classify
from tests.generation.stub import Reply, Stub
from tests.processes.process_runs import before_writing, errors_at_exit, finish, one_thread
from tests.processes.torchruns import torchrun

pytestmark = pytest.mark.processes

ROUNDING = 1e-6
"""Allowed difference between weights, which move by about 1e-4 per step."""
CHUNK = 8
"""Texts that are scored together, few enough for several chunks."""
SECONDS = 300


def work(raw: dict[str, Any], killed_at: str = "") -> None:
    """killed_at: the second process is killed before it writes to a path that contains this."""
    one_thread()
    label_judgment.CHUNK = CHUNK
    forks.patch(fresh_process, "subprocess", replays.IN_THIS_PROCESS)
    if killed_at and process_index() == 1:
        before_writing(killed_at, partial(os.kill, os.getpid(), signal.SIGKILL))
    stillhouse.run(raw)


def classification(folder: Path, name: str) -> dict[str, Any]:
    raw = classify.recipe(folder, data=classify.with_gold(folder))
    return {**raw, "folder": str(folder / name)}


def generation(folder: Path, name: str, shard: str = "none") -> dict[str, Any]:
    """A run with a local teacher and a local judge that compares the answers."""
    judge = {"model": str(folder / "teacher")}
    raw = answering.recipe(folder, "generate", evaluate={"judge": judge})
    raw["train"] = {**raw["train"], "shard": shard}
    return {**raw, "folder": str(folder / name / "run")}  # the journal is beside it


def extraction(folder: Path, name: str, url: str) -> dict[str, Any]:
    """A run with a teacher behind an API; a baseline learns from the reference answers."""
    texts = [{"path": str(folder / "texts.jsonl"), "label": "gold"}]
    raw = answering.recipe(folder, "extract", data={"texts": texts}, **answering.api(folder, url))
    return {**answering.clean(raw), "folder": str(folder / name / "run")}


def reply(number: int, payload: dict[str, Any]) -> Reply:
    return Reply(text=json.dumps(answering.truth(payload["messages"][-1]["content"])))


def stage(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"stages/{name}-*")
    return found


def require_equal_weights(one: Path, two: Path, names: tuple[str, ...]) -> None:
    for name in names:
        ours, theirs = (
            load_file(stage(folder, name) / "model" / "model.safetensors") for folder in (one, two)
        )
        assert ours.keys() == theirs.keys()
        gaps = {key: float((ours[key] - theirs[key]).abs().max()) for key in ours}
        assert max(gaps.values()) <= ROUNDING, (name, gaps)


def evaluated(folder: Path) -> Any:
    """The measurements, without speeds."""
    found = json.loads((stage(folder, "evaluate") / "evaluation.json").read_text())
    for result in found["results"]:
        for figures in (result, result.get("figures", {})):
            figures.pop("texts_per_s", None)
            figures.pop("answers_per_s", None)
    return rounded(found)


def rounded(value: Any) -> Any:
    """Round every number to four digits."""
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: rounded(each) for key, each in value.items()}
        case list():
            return [rounded(each) for each in value]
    return value


def test_two_processes_train_the_classifier_of_one(tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        finish(forks.ranks(processes, work, classification(tmp_path, name)), SECONDS)
    one, two = tmp_path / "one", tmp_path / "two"
    ours, theirs = (
        (stage(folder, "judgment") / "scores.safetensors").read_bytes() for folder in (one, two)
    )
    assert ours == theirs
    require_equal_weights(one, two, ("train", "baseline"))
    assert evaluated(one) == evaluated(two)
    assert len(list(two.glob("report.html"))) == 1


def require_equal_runs(folder: Path, trained: tuple[str, ...], several: str = "two") -> None:
    one, two = folder / "one" / "run", folder / several / "run"
    for file in ("train.jsonl", "heldout.jsonl", "answers.jsonl"):
        ours, theirs = ((stage(run, "answers") / file).read_text() for run in (one, two))
        assert ours == theirs
    require_equal_weights(one, two, ("student", *trained))
    assert evaluated(one) == evaluated(two)


def test_two_processes_train_the_generator_of_one(tmp_path: Path) -> None:
    finish(forks.ranks(1, work, generation(tmp_path, "one")), SECONDS)
    for shard in ("none", "both"):
        finish(forks.ranks(2, work, generation(tmp_path, shard, shard)), SECONDS)
        require_equal_runs(tmp_path, ("train",), shard)


def test_two_processes_train_the_extractor_of_one_with_an_api(tmp_path: Path) -> None:
    with Stub(reply) as stub:
        for name, processes in (("one", 1), ("two", 2)):
            raw = extraction(tmp_path, name, stub.url)
            finish(forks.ranks(processes, work, raw), SECONDS)
        assert len(stub.payloads) == 40  # each run has its own journal
    require_equal_runs(tmp_path, ("train", "baseline"))


@pytest.mark.parametrize("point", ["/chunks/", "/checkpoint-4"], ids=["scoring", "training"])
def test_one_process_finishes_a_classifier_after_a_kill(tmp_path: Path, point: str) -> None:
    finish([forks.Fork(work, classification(tmp_path, "one"))], SECONDS)
    raw = classification(tmp_path, "two")
    processes = forks.ranks(2, work, raw, point)
    errors_at_exit(processes)
    assert processes[1].poll() == -signal.SIGKILL
    finish([forks.Fork(work, raw)], SECONDS)
    require_equal_weights(tmp_path / "one", tmp_path / "two", ("train", "baseline"))


def run_by_two(folder: Path, raw: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return torchrun(folder, 2, "run", "recipe.yaml")


def test_torchrun_prints_one_result(tmp_path: Path) -> None:
    done = run_by_two(tmp_path, classification(tmp_path, "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "error" not in done.stderr
    assert done.stdout.count("report  ") == 1
    assert "next    stillhouse predict " in done.stdout


@pytest.mark.parametrize("kind", ["classify", "generate"])
def test_a_batch_that_cannot_be_divided_is_one_error(tmp_path: Path, kind: str) -> None:
    made = classification if kind == "classify" else generation
    recipe = made(tmp_path, "run")
    recipe["train"]["batch_size"] = 7
    done = run_by_two(tmp_path, recipe)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "train.batch_size 7 is not a multiple of" in done.stderr
    assert not list(tmp_path.rglob("stages/*"))
