"""Which process of a torchrun this is, from the environment that torchrun sets."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def world_size() -> int:
    """Processes of a torchrun; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def process_index() -> int:
    """The number of this process among all; 0 without a torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_index() -> int:
    """The number of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def leads() -> bool:
    """Whether this is the first process of a torchrun, or the only one."""
    return process_index() == 0


def on_main_machine() -> bool:
    """Whether the main process is on this machine."""
    return process_index() == local_index()


def speaks_for_machine() -> bool:
    """Whether this is the first process on its machine beside the main process."""
    return local_index() == (1 if on_main_machine() else 0)


def is_on_this_machine(index: int) -> bool:
    """Whether the process with this number is on this machine."""
    first = process_index() - local_index()
    return first <= index < first + processes_here()


def may_report() -> bool:
    """Whether this process prints why the run ends. Of the processes of a torchrun, the first one
    on this machine that calls this does, and once: most errors are found by every process."""
    global _has_reported
    if world_size() == 1:
        return True
    first, _has_reported = not _has_reported, True
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not first or not file:
        return first
    try:
        # torchrun makes a folder for each process in one of its own for this machine's.
        (Path(file).parent.parent / "stillhouse-has-reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


_has_reported = False


def leave_others() -> None:
    """From now on, this process works alone: no other one of its torchrun takes part."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def end_with_torchrun() -> None:
    """Have the system end this process if torchrun is killed (Linux).

    It would wait for torchrun's store for half an hour or more, and keep the run folder locked.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
