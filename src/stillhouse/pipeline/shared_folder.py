"""Whether all processes of a torchrun work in the same run folder."""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from stillhouse.errors import RunError, StillhouseError
from stillhouse.launch import process_index, world_size
from stillhouse.pipeline.waiting import wait_for_main_process
from stillhouse.process_watch import main_process_finished, watched_processes
from stillhouse.processes import lost_process, open_group
from stillhouse.runfolder import write_atomically

ANNOUNCEMENT = ".torchrun"
"""A file that names the torchrun whose main process works in the folder."""
PATIENCE_SECONDS = 30.0
"""For a file of the main process to become visible on another machine."""
SHOWN = 4
"""Maximum number of processes that an error lists."""

T = TypeVar("T")


@contextmanager
def leading(root: Path, lock: AbstractContextManager[T]) -> Iterator[T]:
    """The work of the main process inside its locked run folder; returns what `lock` does.

    Raises RunError if another process does not see the folder.
    """
    if world_size() == 1:
        with lock as locked:
            yield locked
        return
    open_group()
    with ExitStack() as stack:
        name = secrets.token_hex(8)
        try:
            locked = stack.enter_context(lock)
            write_atomically(root / ANNOUNCEMENT, name)
        except StillhouseError as error:
            _broadcast(error)
            raise
        _broadcast(name)
        _require_shared(root, seen=True)
        with watched_processes():
            yield locked


@contextmanager
def joining(root: Path) -> Iterator[None]:
    """The work of another process, in the same run folder. It ends with that of the main process:
    what a torchrun returns on any node is what has become of the run.

    Raises RunError if the main process cannot start, or another process does not see its folder;
    LostProcessError.
    """
    open_group()
    news = _broadcast(None)
    if isinstance(news, StillhouseError):
        raise news
    _require_shared(root, seen=_appears(root / ANNOUNCEMENT, str(news)))
    with watched_processes():
        yield
        wait_for_main_process(main_process_finished, "the end of its work")


def _broadcast(news: str | StillhouseError | None) -> str | StillhouseError | None:
    """What the main process has given."""
    shared = [news]
    with lost_process(world_size()):
        dist.broadcast_object_list(shared)
    return shared[0]


def _appears(file: Path, content: str) -> bool:
    """Whether the file is there, with this content, within PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not _has(file, content):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _has(file: Path, content: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == content
    except (OSError, ValueError):
        return False


def _require_shared(root: Path, *, seen: bool) -> None:
    """Raise RunError in every process if one of them does not see the main process's folder."""
    mine = None if seen else f"process {process_index()} on {platform.node()} in {root.absolute()}"
    all_of_them: list[str | None] = [None] * world_size()
    with lost_process(world_size()):
        dist.all_gather_object(all_of_them, mine)
    blind = [each for each in all_of_them if each is not None]
    if blind:
        more = f", and {len(blind) - SHOWN} more" if len(blind) > SHOWN else ""
        raise RunError(
            f"{len(blind)} of {world_size()} processes do not see the main process's run folder",
            where="; ".join(blind[:SHOWN]) + more,
            fix="set `folder` to a path on a disk that all nodes share",
        )
