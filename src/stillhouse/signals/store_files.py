"""Files of a store: flushed to disk before they are used, and JSON with a checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stillhouse.atomic_files import complete_or_absent, flush
from stillhouse.errors import StoreError


def write_durably(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it.

    Raises StoreError if the disk is full or the folder cannot be written. The temporary file is
    then removed, and any previous file is unchanged.
    """
    try:
        with complete_or_absent(path) as temporary, temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        flush(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                "the disk is full; every shard before this one is kept",
                where=path.parent,
                fix="free some space and run the same command again to resume",
            ) from error
        raise StoreError(
            f"the store cannot be written ({error.strerror})",
            where=path,
            fix="check that the folder exists and is writable",
        ) from error


def write_checked_json(path: Path, content: dict[str, Any]) -> None:
    """Write the content durably as JSON, with a checksum as its last key."""
    write_durably(path, [_checked_text(content)])


def read_checked_json(path: Path, what: str) -> dict[str, Any]:
    """Read a file that `write_checked_json` wrote. Raises StoreError if any byte has changed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{what} cannot be read ({error.strerror})", where=path) from error
    try:
        content = json.loads(data)
        del content["checksum"]
        intact = _checked_text(content) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise StoreError(
            f"{what} is damaged: its checksum does not match",
            where=path,
            fix="restore it from a copy, or delete it and record the store again",
        )
    return content


def _checked_text(content: dict[str, Any]) -> bytes:
    checksum = hashlib.blake2b(_text(content), digest_size=16).hexdigest()
    return _text({**content, "checksum": checksum})


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
