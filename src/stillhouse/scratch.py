"""Temporary files of a run, in its run folder: the next run deletes those left by a killed one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from stillhouse.disk_errors import disk_errors, full_disk, made_folder
from stillhouse.errors import StillhouseError
from stillhouse.launch import leads, process_index

_LARGER = (
    "free some space there, or set TMPDIR to a folder on a larger disk; then give the same command "
    "again: finished stages are kept"
)
_place: Path | None = None
_root: Path | None = None


@contextmanager
def scratch_in(root: Path) -> Iterator[None]:
    """Inside the block, temporary files are in `root/.scratch`, or in a folder of TMPDIR if that is
    set; each process of a torchrun has its own.

    root: a run folder that no other run uses. The folder is deleted before and after; the main
    process, which comes first, also deletes those that an earlier run's other processes left.
    Raises RunError if nothing can be written to TMPDIR.
    """
    global _place, _root
    before = (_place, _root)
    _place, _root = _of(root), root
    left = _place.parent.glob(f"{_place.name}-*") if leads() else ()
    for folder in (_place, *left):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if os.environ.get("TMPDIR"):
            scratch_place()  # an error before the first stage, not after the training
        yield
    finally:
        shutil.rmtree(_place, ignore_errors=True)
        _place, _root = before


def _of(root: Path) -> Path:
    chosen = os.environ.get("TMPDIR")
    own = f"-{process_index()}" if process_index() else ""
    if not chosen:
        return root / f".scratch{own}"
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    return Path(chosen) / f"stillhouse-{name}{own}"


def scratch_place() -> Path:
    """The folder for temporary files; created if it does not exist. Raises RunError."""
    if _place is None:
        return Path(tempfile.gettempdir())
    with temporary_disk(_place):
        made_folder(_place)
    return _place


def temporary_disk(place: Path) -> AbstractContextManager[None]:
    """As `disk_errors`, for what is written to the folder for temporary files."""
    return disk_errors(place, fix=_LARGER, elsewhere="set TMPDIR to a folder that can be written")


@contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """A folder that is deleted after the `with` block.

    Raises RunError if its disk is full; a full disk of the run folder is another error.
    """
    place = scratch_place()
    with temporary_disk(place):
        made = tempfile.TemporaryDirectory(prefix=prefix, dir=place)
    with made as folder:
        try:
            yield folder
        except StillhouseError:
            raise
        except Exception as error:
            if full_disk(error) and _is_fuller(place, error):
                with temporary_disk(place):
                    raise
            raise


def _is_fuller(place: Path, error: Exception) -> bool:
    """Whether there is less space than on the disk of the run folder."""
    if isinstance(error, OSError) and isinstance(error.filename, str):
        return place in Path(error.filename).parents
    return _root is None or shutil.disk_usage(place).free < shutil.disk_usage(_root).free
