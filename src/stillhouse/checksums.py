"""File hashes: SHA-256 identifies content; XXH3 detects damage as fast as files are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from stillhouse.disk_errors import disk_errors
from stillhouse.errors import ModelError

SUMS = "SHA256SUMS"
"""The file in an export that lists the hashes of the other files."""
_LINE = re.compile("([0-9a-f]{64}) [ *](.+)")
_CHUNK = 1 << 20
_SEAL = "xxh3_of_the_rest"
_intact: set[tuple[str, int, int, int, str]] = set()
"""Files that were read and found intact: path, inode, size, modification time, and hash."""

Facts = Mapping[str, Any]


def sha(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """Return the size and both hashes of a file, reading it once."""
    slow, fast = hashlib.sha256(), xxhash.xxh3_128()
    _read(path, slow.update, fast.update)
    return {
        "bytes": path.stat().st_size,
        "sha256": slow.hexdigest(),
        "xxh3": fast.hexdigest(),
    }


def fast_facts(path: Path) -> dict[str, Any]:
    """Return the size and XXH3 of a file."""
    fast = xxhash.xxh3_128()
    _read(path, fast.update)
    return {"bytes": path.stat().st_size, "xxh3": fast.hexdigest()}


def damaged_files(folder: Path, files: Mapping[str, Facts], *, reread: bool = False) -> list[str]:
    """Return the names of files in `folder` that are missing or differ from the facts in `files`.

    A file without an XXH3 is compared by SHA-256. Unless `reread`, a file that this process has
    found intact and that has not been written since is not read again, and a file with
    `compared_when_read` is compared by size only, because its reader compares the hash.
    """
    return [name for name, facts in files.items() if not _is_intact(folder / name, facts, reread)]


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS with the hash of every other file under the folder, for `sha256sum -c`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SUMS]
    lines = [f"{file_facts(p)['sha256']}  {p.relative_to(folder).as_posix()}\n" for p in files]
    with disk_errors(folder):
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, Facts]:
    """Return the files that SHA256SUMS lists, for `damaged_files`. Raises OSError, ValueError."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    found = [_LINE.fullmatch(line) for line in lines]
    if not all(found):
        raise ValueError("a line is not a hash and a file name")
    return {line[2]: {"sha256": line[1]} for line in found if line}


def wrong_in_export(folder: Path) -> list[str]:
    """Describe the files that differ from SHA256SUMS or that it does not list. Hidden files and
    folders are ignored: git and huggingface_hub add some to a copy."""
    try:
        files = read_sums(folder)
        damaged = damaged_files(folder, files, reread=True)
        found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    except (OSError, ValueError) as error:
        return [f"{SUMS}: {error}"]
    problems = [f"{name} is missing or has changed" for name in damaged]
    names = [path.as_posix() for path in found if not any(part[0] == "." for part in path.parts)]
    unlisted = [name for name in names if name not in {SUMS, *files}]
    return problems + [f"{SUMS} does not list {name}" for name in unlisted]


def require_sound_export(folder: Path) -> None:
    """Raise ModelError if a folder with SHA256SUMS has changed since it was written."""
    problems = wrong_in_export(folder) if (folder / SUMS).is_file() else []
    if problems:
        raise damaged_export(folder, problems[0])


def damaged_export(folder: Path, problem: str) -> ModelError:
    """Build the error about a folder that differs from its SHA256SUMS."""
    return ModelError(
        f"the model is damaged: {problem}",
        where=folder,
        fix="copy the folder again, or rerun `stillhouse run` with its recipe; if you changed the "
        f"file yourself, delete {SUMS} there",
    )


def with_hash(content: bytes) -> bytes:
    """Prepend a line with the content's XXH3, for a file that only Stillhouse reads."""
    return xxhash.xxh3_128_hexdigest(content).encode() + b"\n" + content


def without_hash(data: bytes) -> bytes:
    """Return the content passed to `with_hash`. Raises ValueError if the data has changed."""
    recorded, _, content = data.partition(b"\n")
    if recorded.decode("ascii", "replace") != xxhash.xxh3_128_hexdigest(content):
        raise ValueError("it is not what was written")
    return content


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Add a hash of the facts to themselves, so that damage to their JSON file is noticed."""
    written = json.loads(json.dumps(facts))  # keys become strings, tuples lists
    written.pop(_SEAL, None)
    return {**written, _SEAL: _hash_of(written)}


def seal_broken(facts: Mapping[str, Any]) -> bool:
    """Whether facts have changed since `sealed` returned them."""
    rest = {name: value for name, value in facts.items() if name != _SEAL}
    return bool(facts.get(_SEAL) != _hash_of(rest))


def _hash_of(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _is_intact(path: Path, facts: Facts, reread: bool) -> bool:
    try:
        found = path.stat()
        if not path.is_file() or found.st_size != facts.get("bytes", found.st_size):
            return False
        if facts.get("compared_when_read", False) and not reread:
            return True
        recorded = facts.get("xxh3") or facts["sha256"]
        known = (str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns, recorded)
        if known in _intact and not reread:
            return True
        hashed = xxhash.xxh3_128() if "xxh3" in facts else hashlib.sha256()
        _read(path, hashed.update)
    except OSError:
        return False
    if hashed.hexdigest() != recorded:
        return False
    _intact.add(known)
    return True


def _read(path: Path, *updates: Callable[[memoryview], object]) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            for update in updates:
                update(buffer[:size])
