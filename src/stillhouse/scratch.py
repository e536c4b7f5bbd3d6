"""Temporary files of a run, in its run folder: the next run deletes what a killed one left."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_place: Path | None = None


@contextmanager
def scratch_in(root: Path) -> Iterator[None]:
    """Inside, temporary files are in `root/.scratch`, or in a folder of TMPDIR where that is set.

    root: a run folder that only this process uses. The folder is deleted before and after.
    """
    global _place
    before, _place = _place, _of(root)
    shutil.rmtree(_place, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(_place, ignore_errors=True)
        _place = before


def _of(root: Path) -> Path:
    chosen = os.environ.get("TMPDIR")
    if not chosen:
        return root / ".scratch"
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    return Path(chosen) / f"stillhouse-{name}"


def scratch_place() -> Path:
    """The folder for temporary files, made where it is not there."""
    if _place is None:
        return Path(tempfile.gettempdir())
    _place.mkdir(parents=True, exist_ok=True)
    return _place


def temporary_folder(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A folder that is deleted after the `with` block."""
    return tempfile.TemporaryDirectory(prefix=prefix, dir=scratch_place())
