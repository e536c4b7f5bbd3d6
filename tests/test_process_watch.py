"""If a process ends before its work is finished, the other processes of its torchrun end too.

Each process acts as if on its own machine, so that no torchrun stops the others.
"""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from stillhouse.cli.exits import end_stopped, end_with
from stillhouse.cli.stop_signals import Stopped, raise_on_signals
from stillhouse.errors import TrainingError
from stillhouse.launch import leads, process_index
from stillhouse.pipeline.shared_folder import joining, leading
from tests import forks
from tests.forks import Fork

pytestmark = pytest.mark.run

OWN = "the loss is not finite"


def work(folder: Path, failing: int | None, in_torch: bool) -> None:
    """The work of one process: wait until it may finish.

    failing: the process that raises an error. in_torch: wait in C++, where Python cannot raise.
    """
    raise_on_signals()
    index = process_index()
    try:
        with leading(folder, nullcontext()) if leads() else joining(folder):
            (folder / str(index)).touch()
            if index == failing:
                raise TrainingError(OWN, where="step 3")
            if in_torch:
                dist.distributed_c10d._get_default_store().wait(["never"], timedelta(minutes=2))
            last = "finished" if index == 0 else "others finished"
            while not (folder / last).exists():
                time.sleep(0.01)
            (folder / f"end of {index}").touch()
    except Stopped as stopped:
        end_stopped(stopped.number)
    except Exception as error:
        end_with(error)


def started(folder: Path, failing: int | None = None, *, in_torch: bool = False) -> list[Fork]:
    """Start three processes and wait until they have begun their work."""
    processes = forks.ranks(3, work, folder, failing, in_torch, nodes=3)
    while len(list(folder.glob("[0-2]"))) < 3:
        assert failing is not None or all(each.poll() is None for each in processes)
        time.sleep(0.01)
    return processes


def errors_of(process: Fork) -> str:
    return process.communicate(timeout=60)[1]


def one_error(process: Fork) -> str:
    found = errors_of(process)
    assert process.poll() not in (0, None)
    assert found.count("error: ") + found.count("stopped. ") == 1, found
    assert "Traceback" not in found
    return found


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_one_error_on_each_other_machine(tmp_path: Path, killed: int) -> None:
    processes = started(tmp_path)
    processes[killed].send_signal(signal.SIGKILL)
    for index in {0, 1, 2} - {killed}:
        found = one_error(processes[index])
        assert f"process {killed} of 3 has ended\n  where: it was killed" in found
        assert "run the same command again" in found


def test_a_process_that_waits_in_torch_reports_that_another_one_was_killed(tmp_path: Path) -> None:
    processes = started(tmp_path, in_torch=True)
    processes[2].send_signal(signal.SIGKILL)
    assert "process 2 of 3 has ended\n  where: it was killed" in one_error(processes[0])


def test_the_main_process_reports_that_another_one_was_killed(tmp_path: Path) -> None:
    processes = started(tmp_path)
    processes[2].send_signal(signal.SIGKILL)
    assert "process 2 of 3 has ended\n  where: it was killed" in one_error(processes[0])


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_the_others(tmp_path: Path, failing: int) -> None:
    processes = started(tmp_path, failing)
    assert OWN in one_error(processes[failing])
    for index in {0, 1, 2} - {failing}:
        expected = f"process {failing} of 3 has ended\n  where: its own message says why"
        assert expected in one_error(processes[index])


def test_a_stopped_main_process_ends_the_others(tmp_path: Path) -> None:
    processes = started(tmp_path)
    processes[0].send_signal(signal.SIGTERM)
    assert one_error(processes[0]).startswith("stopped. ")
    for process in processes[1:]:
        assert "process 0 of 3 has ended\n  where: it was stopped by" in one_error(process)


def finish_others(folder: Path) -> None:
    """Let all but the main process finish."""
    (folder / "others finished").touch()
    while len(list(folder.glob("end of *"))) < 2:
        time.sleep(0.01)


def test_processes_that_finish_at_different_times_report_no_error(tmp_path: Path) -> None:
    processes = started(tmp_path)
    finish_others(tmp_path)
    (tmp_path / "finished").touch()
    for process in processes:
        assert errors_of(process) == ""
        assert process.poll() == 0


def test_finished_processes_fail_if_the_main_process_is_killed(tmp_path: Path) -> None:
    """Otherwise, torchrun would wait on their machines for five minutes and then report success."""
    processes = started(tmp_path)
    finish_others(tmp_path)
    processes[0].send_signal(signal.SIGKILL)
    for process in processes[1:]:
        assert "process 0 of 3 has ended\n  where: it was killed" in one_error(process)
