"""This process's place in a torchrun, from the environment variables that torchrun sets."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def world_size() -> int:
    """The number of processes of a torchrun; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """The number of a torchrun's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def process_index() -> int:
    """This process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_index() -> int:
    """This process's rank among the processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def leads() -> bool:
    """Whether this is the main process (rank 0) of a torchrun, or the only process."""
    return process_index() == 0


def on_main_machine() -> bool:
    """Whether the main process is on this machine."""
    return process_index() == local_index()


def speaks_for_machine() -> bool:
    """Whether this is the first process on its machine, not counting the main process."""
    return local_index() == (1 if on_main_machine() else 0)


def is_on_this_machine(index: int) -> bool:
    """Whether the process with this rank is on this machine."""
    first = process_index() - local_index()
    return first <= index < first + processes_here()


def may_report() -> bool:
    """Whether this process should print why the run ends.

    Most errors are found by every process of a torchrun, so only the first process on this machine
    that calls this reports, and only once.
    """
    global _has_reported
    if world_size() == 1:
        return True
    first, _has_reported = not _has_reported, True
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not first or not file:
        return first
    try:
        # torchrun creates a folder per machine, with a subfolder for each process.
        (Path(file).parent.parent / "stillhouse-has-reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


_has_reported = False


def leave_others() -> None:
    """Make this process work alone from now on, without the other processes of its torchrun."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def end_with_torchrun() -> None:
    """Have the system end this process if torchrun is killed (Linux).

    Otherwise it would wait for torchrun's store for half an hour or more, and keep the run folder
    locked.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
