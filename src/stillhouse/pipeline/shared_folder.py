"""Whether the other processes of a torchrun see the main process's run folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

from stillhouse.errors import RunError
from stillhouse.launch import world_size

ANNOUNCEMENT = ".torchrun"
PATIENCE_SECONDS = 45.0
"""For the main process to start and announce its run."""
CLOCKS_SECONDS = 300.0
"""By which clocks of nodes, and the starts of their processes, may differ."""


def announce_run(folder: Path) -> None:
    """Write down which torchrun works in this folder."""
    if world_size() > 1:
        (folder / ANNOUNCEMENT).write_text(_run(), encoding="utf-8")


def wait_for_run(folder: Path, *, patience: float = PATIENCE_SECONDS, poll: float = 0.2) -> None:
    """Return once the main process of this torchrun has announced itself in the folder.

    Raises RunError after `patience` seconds: the folder is not the one that it works in.
    """
    file, deadline = folder / ANNOUNCEMENT, time.monotonic() + patience
    while not _announced(file):
        if time.monotonic() > deadline:
            raise RunError(
                "this node does not see the run folder of the main process",
                where=folder.absolute(),
                fix="set `folder` to a place on a disk that all nodes share",
            )
        time.sleep(poll)


def _announced(file: Path) -> bool:
    try:
        recent = file.stat().st_mtime > time.time() - CLOCKS_SECONDS
        return recent and file.read_text(encoding="utf-8") == _run()
    except (OSError, ValueError):
        return False


def _run() -> str:
    """What all processes of one torchrun have in common."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(os.environ.get(name, "") for name in names)
