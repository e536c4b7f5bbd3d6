"""A run's temporary files, in its run folder; the next run deletes what a killed one left."""

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
    "free some space there, or set TMPDIR to a folder on a larger disk, and run the same command "
    "again: finished stages are kept"
)
_place: Path | None = None
_root: Path | None = None


@contextmanager
def scratch_in(root: Path) -> Iterator[None]:
    """Put temporary files in `root/.scratch` inside the block, or in a subfolder of TMPDIR if that
    is set. Each process of a torchrun has its own folder.

    root: a run folder that no other run uses. The folder is deleted before and after the block; the
    main process, which enters first, also deletes the folders that an earlier run's processes left.
    Raises RunError if TMPDIR is not writable.
    """
    global _place, _root
    before = (_place, _root)
    own = f"-{process_index()}" if process_index() else ""
    chosen = os.environ.get("TMPDIR")
    _place, _root = root / f".scratch{own}", root
    if chosen:
        name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
        _place = Path(chosen) / f"stillhouse-{name}{own}"
    left = _place.parent.glob(f"{_place.name}-*") if leads() else ()
    for folder in (_place, *left):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if chosen:
            scratch_place()  # fail before the first stage, not after training
        yield
    finally:
        shutil.rmtree(_place, ignore_errors=True)
        _place, _root = before


def scratch_place() -> Path:
    """Return the folder for temporary files, creating it if necessary. Raises RunError."""
    if _place is None:
        return Path(tempfile.gettempdir())
    with temporary_disk(_place):
        made_folder(_place)
    return _place


def temporary_disk(place: Path) -> AbstractContextManager[None]:
    """Like `disk_errors`, for writing to the folder for temporary files."""
    return disk_errors(place, fix=_LARGER, elsewhere="set TMPDIR to a writable folder")


@contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """Create a folder that is deleted after the `with` block.

    Raises RunError if its disk is full. A full disk under the run folder raises a different error.
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
    """Whether this folder's disk has less free space than the run folder's, or the error names a
    file in it."""
    if isinstance(error, OSError) and isinstance(error.filename, str):
        return place in Path(error.filename).parents
    return _root is None or shutil.disk_usage(place).free < shutil.disk_usage(_root).free
