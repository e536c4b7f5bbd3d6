"""Files that are written completely or not at all, and that are on disk before they are used."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stillhouse.disk_errors import disk_errors

PARTIAL = ".partial"
"""The end of the name of a file that `complete_or_absent` has not finished."""


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush every file under the folder, and then the folders, to disk."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    for path in sorted(paths, key=lambda p: (p.is_dir(), str(p))):
        flush(path)
    flush(folder)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically, so that it never contains part of the new content. A device or a
    pipe is written directly. Raises RunError."""
    temporary = path.with_name(f".{path.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return
        try:
            temporary.write_bytes(data)
            flush(temporary)
            temporary.replace(path)
        except FileNotFoundError as error:
            if not path.parent.is_dir():
                raise
            # The folder does not allow new files, as in /proc.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` after the block. If the block raises, the
    temporary file is removed, and any previous file is unchanged. A device or a pipe is written
    directly."""
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield temporary
        if temporary.exists():
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # nothing reads what is left behind
            temporary.unlink(missing_ok=True)
        raise
