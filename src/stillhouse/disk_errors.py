"""Turns any library's error about a full disk, a permission, or a blocked path into one message."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from stillhouse.errors import RunError, StillhouseError

KEPT = (
    "free some space and run the same command again: finished stages and complete checkpoints "
    "are kept"
)
ELSEWHERE = "use another path (for a run: --set folder=PATH)"
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than the disk or `ulimit -f` allows",
}
_OWNER, _MOVE = "check its owner and permissions, or ", "move it out of the way, or "
_UNUSABLE = {
    errno.EACCES: ("permission denied", _OWNER),
    errno.EPERM: ("permission denied", _OWNER),
    errno.EROFS: ("the disk is read-only", ""),
    errno.EEXIST: ("there is a file where a folder should be", _MOVE),
    errno.ENOTDIR: ("there is a file where a folder should be", _MOVE),
    errno.ENOTEMPTY: ("there is a folder where a file should be", _MOVE),
    errno.EISDIR: ("there is a folder where a file should be", _MOVE),
    errno.ENAMETOOLONG: ("the path is too long", ""),
    errno.ELOOP: ("the path is a link that leads back to itself", _MOVE),
}
_BROKEN = {
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the disk is no longer connected",
    errno.ENODEV: "the disk is no longer connected",
    errno.ENXIO: "the disk is no longer connected",
}
_REPAIR = "check the disk (`dmesg` shows its errors) and run the same command again"
_OS_ERROR = re.compile(r"(?:\(os error |\[Errno )(\d+)[\])]")
"""How Rust libraries, and Python when it copies many files, report a system error."""
_NO_SPACE = re.compile(
    "No space left|disk is full|PytorchStreamWriter failed writing|unexpected pos \\d+ vs"
)


@contextmanager
def disk_errors(where: Path, fix: str = KEPT, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Turn disk errors into a RunError; other errors pass through.

    where: the path that the block writes to. fix: what to do about a full disk. elsewhere: what to
    do about an unusable path.
    """
    try:
        yield
    except StillhouseError:
        raise
    except Exception as error:
        problem = disk_error(error, where, fix, elsewhere)
        if problem is None:
            raise
        raise problem from error


def disk_error(
    error: BaseException,
    where: Path | None,
    fix: str = KEPT,
    elsewhere: str = ELSEWHERE,
) -> RunError | None:
    """Return the error that `disk_errors` raises; None if the disk is not the cause.

    where: None if it is not known.
    """
    code = _code(error)
    # In a rename, the second path is the one in the way.
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else where
    place = path or "not known"
    if code in _FULL:
        return RunError(_FULL[code], where=place, fix=fix)
    if code in _BROKEN:
        return RunError(_BROKEN[code], where=place, fix=_REPAIR)
    if code in _UNUSABLE and path is not None:
        what, first = _UNUSABLE[code]
        if where in (path, *path.parents):
            what = f"cannot write here: {what}"
        return RunError(what, where=place, fix=first + elsewhere)
    if code == errno.ENOENT and path and where and where in path.parents and not where.is_dir():
        what = "the folder does not exist: it may have been deleted or moved"
        return RunError(what, where=where, fix=elsewhere)
    return None


def download_errors() -> AbstractContextManager[None]:
    """Like `disk_errors`, for the download caches of huggingface_hub and datasets."""
    return disk_errors(
        Path(os.environ.get("HF_HOME", "~/.cache/huggingface")),
        fix="free some space there, or set HF_HOME to a folder on a larger disk",
        elsewhere="set HF_HOME to a writable folder",
    )


def made_folder(folder: Path) -> None:
    """Create the folder and its parents unless they exist. Raises OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        if not folder.parent.is_dir():  # it was deleted or moved in the meantime
            raise
        # The parent exists but does not allow new entries.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder)) from error


def full_disk(error: BaseException) -> bool:
    """Whether a full disk caused the error."""
    return _code(error) in _FULL


def _code(error: BaseException) -> int | None:
    """The system error's number. Some libraries raise their own error types, so their text is
    searched for it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := _OS_ERROR.search(text):
        return int(found[1])
    return errno.ENOSPC if _NO_SPACE.search(text) else None
