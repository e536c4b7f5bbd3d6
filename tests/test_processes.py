"""A killed process of a torchrun is reported as one error, and ends the other processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from torch.distributed import DistNetworkError
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from stillhouse import launch, processes
from stillhouse.cli.stop_signals import Stopped, raise_on_signals
from stillhouse.errors import LostProcessError, ModelError, StillhouseError, TrainingError
from stillhouse.launch import is_on_this_machine, may_report
from stillhouse.processes import lost_process, open_group
from stillhouse.runfolder import RunFolder
from stillhouse.teachers.load_model import load_model
from tests import forks, tiny
from tests.forks import Fork

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:61062: "
    "Connection reset by peer. This is typically caused by a remote worker hanging"
)


@pytest.mark.run
def test_a_lost_process_is_one_error() -> None:
    ended = "another of the 2 processes has ended"
    with pytest.raises(TrainingError, match=ended) as caught, lost_process(2):
        raise RuntimeError(GLOO)
    assert "same command" in str(caught.value.fix)
    with pytest.raises(LostProcessError) as twice, lost_process(2):
        raise caught.value
    assert twice.value is caught.value


def test_a_process_lost_while_a_sharded_model_is_loaded_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise DistNetworkError("Broken pipe")

    tiny.save_model(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "NOTICE_SECONDS", 0.0)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", broken)
    over = DistributedConfig(fsdp_size=2)
    with pytest.raises(LostProcessError, match="another of the 2 processes has ended"):
        load_model(tmp_path, dtype=torch.float32, distributed=over)
    with pytest.raises(ModelError, match="this model cannot be loaded"):
        load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(("processes", "said"), [(1, GLOO), (2, "shapes do not match")])
def test_other_errors_are_passed_on_unchanged(processes: int, said: str) -> None:
    with pytest.raises(RuntimeError) as caught, lost_process(processes):
        raise RuntimeError(said)
    assert not isinstance(caught.value, StillhouseError)


def test_only_one_process_of_a_machine_reports_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setattr(launch, "_has_reported", False)  # as in another process
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{tmp_path}/{rank}/error.json")
        assert may_report() == (rank == 0)
        assert not may_report()


def test_without_torchruns_folder_each_process_reports_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for file in ("", "/nowhere/0/error.json"):
        monkeypatch.setattr(launch, "_has_reported", False)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
        assert may_report()
        assert not may_report()


def test_a_process_alone_reports_every_error() -> None:
    assert may_report()
    assert may_report()


@pytest.mark.parametrize(
    ("index", "here", "expected"), [(4, 2, [4, 5]), (5, 2, [4, 5]), (0, 4, [0, 1, 2, 3])]
)
def test_processes_on_the_same_machine_are_recognized(
    index: int, here: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = {"RANK": index, "LOCAL_RANK": index % here, "LOCAL_WORLD_SIZE": here}
    for name, value in local.items():
        monkeypatch.setenv(name, str(value))
    assert [other for other in range(8) if is_on_this_machine(other)] == expected


def wait_for_a_second_process(waits: Path) -> None:
    raise_on_signals()
    try:
        waits.touch()
        open_group()
    except Stopped as stopped:
        sys.exit(128 + stopped.number)


@pytest.mark.run
def test_a_signal_ends_a_process_that_waits_for_others(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    waits = tmp_path / "waits"
    process = Fork(wait_for_a_second_process, waits, environment={**address, **ranks})
    while not waits.exists():
        assert process.poll() is None, process.errors()
        time.sleep(0.01)
    time.sleep(0.5)  # until it waits in torch, which this test is about
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


@pytest.mark.run
@pytest.mark.processes
def test_a_killed_torchrun_ends_all_processes_and_the_run_can_continue(tmp_path: Path) -> None:
    process, ranks = start_training(tmp_path)
    process.kill()
    gone, _ = psutil.wait_procs(ranks.values(), timeout=10)
    process.communicate()
    assert len(gone) == 2
    with RunFolder(tmp_path / "run").locked():
        assert list((tmp_path / "run" / "stages").glob(".train-*.partial"))


@pytest.mark.run
@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_a_killed_rank_ends_the_other_with_one_error(tmp_path: Path, killed: int) -> None:
    process, ranks = start_training(tmp_path)
    try:
        ranks[killed].kill()
        ranks[1 - killed].wait(timeout=10)
        _, said = process.communicate(timeout=60)
    finally:
        process.terminate()
    own = said.split("torch/distributed/run.py")[0]  # torchrun ends with a traceback of its own
    assert "site-packages/typer" not in own
    assert "this is a bug" not in said
    assert own.count("error: ") == own.count(f"error: process {killed} of 2 has ended") == 1


def start_training(folder: Path) -> tuple[subprocess.Popen[str], dict[int, psutil.Process]]:
    """A torchrun in the middle of training, and its processes by rank."""
    recipe = folder / "recipe.yaml"
    train = {"micro_batch_size": 2, "epochs": 300}
    recipe.write_text(yaml.safe_dump(tiny.recipe(folder, train=train)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launch, "-m", "stillhouse", "run", str(recipe)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((folder / "run" / "stages").glob(".train-*.partial/checkpoints/*")):
        assert process.poll() is None
        time.sleep(0.05)
    ranks = {
        int(child.environ()["LOCAL_RANK"]): child
        for child in psutil.Process(process.pid).children()
        if "LOCAL_RANK" in child.environ()
    }
    return process, ranks


@pytest.mark.run
def test_an_error_in_the_recipe_is_reported_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.recipe(tmp_path, train={"epoch": 1})))
    processes = forks.two_stillhouse("run", str(recipe))
    said = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert [process.poll() for process in processes] == [1, 1]
    assert said.count("unknown key `train.epoch`") == 1
