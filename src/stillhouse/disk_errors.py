"""A full disk, a missing permission or a vanished folder as one message, in any library's words."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillhouse.errors import RunError, StillhouseError

_DISK = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_FULL = re.compile(
    "No space left|os error 28|disk is full|PytorchStreamWriter failed|inline_container"
    "|unexpected pos"
)
"""How libraries say that a file could not be written to its end."""
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (FileExistsError, NotADirectoryError, IsADirectoryError)
KEPT = (
    "free some space and give the same command again: finished stages and complete checkpoints "
    "are kept"
)


@contextmanager
def disk_errors(where: Path, fix: str = KEPT) -> Iterator[None]:
    """Turns a full disk, a missing permission or a folder that vanished into a RunError; other
    errors pass.

    where: what is written inside the block. fix: what to do about a full disk.
    """
    try:
        yield
    except StillhouseError:
        raise
    except Exception as error:
        full = full_disk(error)
        if full is not None:
            raise RunError(full, where=where, fix=fix) from error
        if not isinstance(error, OSError):
            raise
        if error.errno in _PERMISSION or isinstance(error, _NO_FOLDER):
            raise RunError(
                f"cannot write here: {error.strerror}",
                where=error.filename or where,
                fix="check the folder's owner and permissions, or give another folder: "
                "--set folder=PATH",
            ) from error
        raise


def full_disk(error: BaseException) -> str | None:
    """What is full, where that is the reason of the error.

    torch and safetensors report a full disk as errors of their own, so their text is checked.
    """
    if isinstance(error, OSError) and error.errno in _DISK:
        return _DISK[error.errno]
    return "the disk is full" if _FULL.search(str(error)) else None
