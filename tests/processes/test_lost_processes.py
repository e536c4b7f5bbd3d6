"""Two torchruns on one machine act as two nodes that lose a process or do not share a folder."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from tests import tiny
from tests.processes.process_runs import KINDS
from tests.processes.torchruns import agents, stderr_of

pytestmark = pytest.mark.processes

END_SECONDS, MOST_SECONDS = 10, 60
STAGES = ("student", "signals", "train", "evaluate", "export")
"""In the last one, only the main process has work to do."""


def allowed_seconds() -> float:
    """10 seconds, or up to a minute on a machine with more work than cores."""
    waiting = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    return min(END_SECONDS * waiting, MOST_SECONDS)


def ended_in_time(processes: Sequence[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=allowed_seconds())
    return not alive


def processes_of(agent: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes of a torchrun, by rank."""
    children = [
        child for child in psutil.Process(agent.pid).children() if "RANK" in child.environ()
    ]
    return {int(child.environ()["RANK"]): child for child in children}


def test_nodes_without_a_shared_folder_report_one_error_each(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe(tmp_path, folder="run")))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    for agent in agents(path, folders):
        said = stderr_of(agent)
        assert agent.returncode == 1
        assert said.count("error: 1 of 2 processes do not see the main process's run folder") == 1
        assert "a disk that all nodes share" in said
        assert "site-packages/typer" not in said  # only torchrun ends with a traceback
    assert not list(tmp_path.glob("*/run/stages/*"))


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_process_killed_on_one_node_ends_the_process_of_the_other(
    tmp_path: Path, stage: str, killed: int
) -> None:
    train = {"micro_batch_size": 2, "max_steps": 40, "shard": "both", "checkpoint_every": 100}
    path, stages = tmp_path / "recipe.yaml", tmp_path / "run" / "stages"
    path.write_text(yaml.safe_dump(tiny.recipe(tmp_path, train=train, **KINDS["stored"])))
    nodes = agents(path, [tmp_path, tmp_path])
    try:
        while not list(stages.glob(f".{stage}-*.partial")) and not list(stages.glob(f"{stage}-*")):
            assert all(node.poll() is None for node in nodes), [stderr_of(node) for node in nodes]
            time.sleep(0.002)
        found = {**processes_of(nodes[0]), **processes_of(nodes[1])}
        of_killed = nodes[0] if killed in processes_of(nodes[0]) else nodes[1]
        found[killed].kill()
        assert ended_in_time([found[1 - killed]])
        for node in nodes:  # the nodes do not wait for each other
            node.wait(timeout=allowed_seconds())
    finally:
        for node in nodes:
            node.terminate()
    for node in nodes:
        said = stderr_of(node)
        expected = 0 if node is of_killed else 1
        assert said.count(f"error: process {killed} of 2 has ended") == expected, said
        assert said.count("error: ") == expected, said
        assert "this is a bug" not in said


def test_only_one_process_of_a_machine_reports_that_another_was_killed(tmp_path: Path) -> None:
    path, stages = tmp_path / "recipe.yaml", tmp_path / "run" / "stages"
    train = {"batch_size": 6, "epochs": 300}
    path.write_text(yaml.safe_dump(tiny.recipe(tmp_path, train=train)))
    (node,) = agents(path, [tmp_path], each=(3,))
    while not list(stages.glob(".train-*.partial/checkpoints/*")):
        assert node.poll() is None, stderr_of(node)
        time.sleep(0.01)
    found = processes_of(node)
    found.pop(2).kill()
    assert ended_in_time(list(found.values()))
    assert stderr_of(node).count("error: process 2 of 3 has ended") == 1
