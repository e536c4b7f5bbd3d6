"""Which process of a torchrun this is, from the environment that torchrun sets."""

from __future__ import annotations

import os


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
