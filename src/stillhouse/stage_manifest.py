"""A finished stage's manifest, which lists its files and their hashes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from stillhouse.checksums import file_facts, seal_broken

MANIFEST = "manifest.json"


def read_manifest(stage: Path) -> dict[str, Any]:
    """Read a finished stage's manifest. Raises OSError, or ValueError if it is damaged."""
    manifest = json.loads((stage / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or seal_broken(manifest):
        raise ValueError("it is not what was written")
    return manifest


def facts_of_files(
    folder: Path, scratch: tuple[str, ...], compared_when_read: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Return the sizes and hashes of all files under the folder, for `damaged_files`.

    scratch: names inside the folder to leave out. compared_when_read: patterns of files whose
    readers compare their hashes.
    """
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and str(name) != MANIFEST and name.parts[0] not in scratch:
            found[str(name)] = file_facts(file)
            if any(name.match(pattern) for pattern in compared_when_read):
                found[str(name)]["compared_when_read"] = True
    return found


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python, Stillhouse, and the libraries that determine a stage's
    result."""
    names = ("stillhouse", "torch", "transformers", "accelerate", "tokenizers", "safetensors")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def digest_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Hash the contents of a stage's files."""
    hashes = {name: facts["sha256"] for name, facts in files.items()}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
