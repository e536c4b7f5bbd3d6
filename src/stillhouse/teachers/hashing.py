"""SHA-256 of files, cached by path, size and modification time; and of code."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from types import ModuleType


def cache_folder(cache: Path | None = None) -> Path:
    """`cache`, or $STILLHOUSE_CACHE, or ~/.cache/stillhouse."""
    if cache is not None:
        return cache
    named = os.environ.get("STILLHOUSE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "stillhouse"


def file_sha256(path: Path, cache: Path) -> str:
    """The file's SHA-256 in hex; a file with unchanged size and time is not read again."""
    stat = path.stat()
    key = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    remembered = cache / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    if remembered.is_file():
        known = remembered.read_text(encoding="ascii").strip()
        if len(known) == 64:
            return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(remembered, digest)
    return digest


def code_sha256(*packages: ModuleType) -> str:
    """SHA-256 over the names and source of the packages' modules."""
    total = hashlib.sha256()
    for package in packages:
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                total.update(f"{package.__name__} {file.relative_to(folder)}\n".encode())
                total.update(file.read_bytes())
    return total.hexdigest()


def _remember(path: Path, digest: str) -> None:
    """A cache that cannot be written costs time, not correctness, so it is not an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        temporary.write_text(digest, encoding="ascii")
        temporary.replace(path)
    except OSError:
        return
