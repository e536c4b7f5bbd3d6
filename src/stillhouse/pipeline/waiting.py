"""How a process of a torchrun waits for the main process, which does some of the work alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from stillhouse.launch import process_index, speaks_for_machine
from stillhouse.process_watch import lost_process_found
from stillhouse.progress import note

POLL_SECONDS = 0.5
SILENT_SECONDS = 60.0
"""After which one process of each machine reports what it is waiting for."""

T = TypeVar("T")


def wait_for_main_process(find: Callable[[], T | None], what: str) -> T:
    """Call `find` until it returns something, which is returned. what: the main process's work.

    Raises LostProcessError if another process ends before.
    """
    began, said = time.monotonic(), not speaks_for_machine()
    while (found := find()) is None:
        if (lost := lost_process_found()) is not None:
            raise lost
        if not said and time.monotonic() - began > SILENT_SECONDS:
            note(f"process {process_index()}: waiting for the main process ({what})")
            said = True
        time.sleep(POLL_SECONDS)
    return found
