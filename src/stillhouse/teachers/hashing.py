"""SHA-256 of code, and of files (cached by path, size, and modification time)."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from stillhouse.checksums import SUMS, damaged_files, file_facts, read_sums, with_hash, without_hash


def cache_folder(cache: Path | None = None) -> Path:
    """`cache`, or $STILLHOUSE_CACHE, or ~/.cache/stillhouse."""
    if cache is not None:
        return cache
    named = os.environ.get("STILLHOUSE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "stillhouse"


def file_sha256(path: Path, cache: Path, *, reread: bool = False) -> str:
    """The file's SHA-256 in hex. A file with unchanged size and time is not read again.

    reread: check it with XXH3 anyway, which is ten times as fast, to find damage on the disk.
    """
    stat = path.stat()
    key = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    remembered = cache / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError, ValueError):
        facts = json.loads(without_hash(remembered.read_bytes()))
        if not (reread and damaged_files(path.parent, {path.name: facts})):
            return str(facts["sha256"])
    facts = file_facts(path)
    with suppress(OSError):  # a cache that cannot be written costs time, not correctness
        remembered.parent.mkdir(parents=True, exist_ok=True)
        temporary = remembered.with_name(f"{remembered.name}.{uuid.uuid4().hex}")
        temporary.write_bytes(with_hash(json.dumps(facts).encode()))
        temporary.replace(remembered)
    return str(facts["sha256"])


def changed_files(folder: Path, names: Iterable[str], cache: Path) -> list[str]:
    """The files that do not match SHA256SUMS in a model's folder; none if there is no SHA256SUMS.

    The list can also be another author's. Files that it leaves out are not checked.
    """
    if not (folder / SUMS).is_file():
        return []
    try:
        sums = read_sums(folder)
    except (OSError, ValueError):
        return [SUMS]
    return [
        name
        for name in names
        if name in sums and file_sha256(folder / name, cache, reread=True) != sums[name]["sha256"]
    ]


def code_sha256(*packages: ModuleType) -> str:
    """SHA-256 of the names and source code of the packages' modules."""
    total = hashlib.sha256()
    for package in packages:
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                total.update(f"{package.__name__} {file.relative_to(folder)}\n".encode())
                total.update(file.read_bytes())
    return total.hexdigest()
