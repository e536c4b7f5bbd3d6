"""The time that a process was ready to run while other processes occupied all cores.

Linux records this for each thread (/proc/PID/schedstat). Subtracting it from the wall-clock time
makes time limits meaningful on a busy machine.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

EVERY = 0.1
"""Seconds between readings."""


class CoreWaits:
    """Watches the main threads of a process and of its descendants while the block is active."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._readings: list[tuple[float, dict[int, float]]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CoreWaits:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def since(self, moment: float) -> float:
        """Seconds that the longest-waiting process has waited since `moment`, a time from
        time.monotonic(). Returns 0 if the system does not record them."""
        before: dict[int, float] = {}
        last: dict[int, float] = {}
        for at, found in self._readings:
            (before if at <= moment else last).update(found)
        return max((waited - before.get(pid, 0.0) for pid, waited in last.items()), default=0.0)

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            found = dict(_waited(self._pid))
            self._readings.append((time.monotonic(), found))


def _waited(pid: int) -> list[tuple[int, float]]:
    """Read the waiting time of a process and each of its descendants that is still running."""
    folder = Path(f"/proc/{pid}")
    try:
        _, waited, _ = (folder / "schedstat").read_text().split()
        children = (folder / f"task/{pid}/children").read_text().split()
    except (OSError, ValueError):
        return []
    below = [pair for child in children for pair in _waited(int(child))]
    return [(pid, int(waited) / 1e9), *below]
