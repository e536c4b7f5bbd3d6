"""Locks on files and folders, released when the process that holds them ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from stillhouse.disk_errors import disk_errors
from stillhouse.errors import RunError
from stillhouse.progress import note

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""Errors from disks without locks; EBADF comes from NFS, which cannot lock folders."""


def try_lock(file: IO[Any] | int, *, shared: bool = False) -> bool:
    """Lock an open file or folder for this process; return False if another process holds it.

    On a disk without locks, warn once and return True.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_once()
    return True


@cache
def _warn_once() -> None:
    note(
        "warning: this disk does not support file locks: make sure that no other process uses the "
        "same folder or journal"
    )


@contextmanager
def locked_while_writing(folder: Path, what: str) -> Iterator[None]:
    """Create the folder unless it exists, and lock it for this process inside the block.

    Raises RunError if another process has locked it or it cannot be created.
    """
    with disk_errors(folder, elsewhere="use another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if not _held(folder, stack):
            raise RunError(
                f"another process is writing this {what}",
                where=folder,
                fix="wait for it, or use a different folder",
            )
        yield


def is_same(path: Path, known: os.stat_result) -> bool:
    """Whether the path still refers to a known file or folder."""
    try:
        return os.path.samestat(known, path.stat())
    except OSError:
        return False


@contextmanager
def building_folder(path: Path) -> Iterator[Path]:
    """Create an empty folder next to `path`, and delete it after the block unless it was renamed.

    Folders left behind by killed processes are deleted first. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(path)
    while True:
        building = path.with_name(f".{path.name}.{os.urandom(16).hex()}")
        building.mkdir()
        with ExitStack() as stack:
            if not _held(building, stack):
                continue  # another process mistook it for an abandoned folder
            try:
                yield building
            finally:
                shutil.rmtree(building, ignore_errors=True)
            return


def _held(folder: Path, stack: ExitStack) -> bool:
    """Lock the folder until the stack is closed. Return False if another process has locked it, or
    has just renamed or deleted it."""
    try:
        opened = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, opened)
        return try_lock(opened) and os.path.samestat(os.fstat(opened), folder.stat())
    except FileNotFoundError:
        return False


def _delete_abandoned(path: Path) -> None:
    """Delete the building folders of `path` that no process has locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}"):
        with suppress(OSError):  # on a disk without locks, they stay
            opened = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(opened)
