"""Shares a run folder among a torchrun's processes: all of them must see it, and the others wait
there for the work that the main process does alone."""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from stillhouse.atomic_files import write_atomically
from stillhouse.errors import RunError, StillhouseError
from stillhouse.launch import process_index, speaks_for_machine, world_size
from stillhouse.process_watch import lost_process_found, main_process_finished, watched_processes
from stillhouse.processes import lost_process, open_group
from stillhouse.progress import note

ANNOUNCEMENT = ".torchrun"
"""A file that names the torchrun whose main process is using the folder."""
PATIENCE_SECONDS = 30.0
"""How long to wait for the main process's file to become visible on another machine."""
POLL_SECONDS = 0.5
SILENT_SECONDS = 60.0
"""After this time, one process per machine reports what it is waiting for."""
SHOWN = 4
"""Maximum number of processes that an error lists."""

T = TypeVar("T")


@contextmanager
def leading(root: Path, lock: AbstractContextManager[T]) -> Iterator[T]:
    """Wrap the main process's work in its locked run folder; yield what `lock` yields.

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
    """Wrap another process's work in the same run folder. It ends together with the main process's
    work, so that torchrun's exit status on any node tells how the run ended.

    Raises RunError if the main process cannot start or another process does not see its folder,
    and LostProcessError if another process ends.
    """
    open_group()
    news = _broadcast(None)
    if isinstance(news, StillhouseError):
        raise news
    _require_shared(root, seen=_appears(root / ANNOUNCEMENT, str(news)))
    with watched_processes():
        yield
        wait_for_main_process(main_process_finished, "the end of its work")


def wait_for_main_process(find: Callable[[], T | None], what: str) -> T:
    """Call `find` until it returns something, and return that. what: what the main process does.

    Raises LostProcessError if another process ends first.
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


def _broadcast(news: str | StillhouseError | None) -> str | StillhouseError | None:
    shared = [news]
    with lost_process(world_size()):
        dist.broadcast_object_list(shared)
    return shared[0]


def _appears(file: Path, content: str) -> bool:
    """Whether the file appears with this content within PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        with suppress(OSError, ValueError):
            if file.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _require_shared(root: Path, *, seen: bool) -> None:
    """Raise RunError in every process if any process does not see the main process's folder."""
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
