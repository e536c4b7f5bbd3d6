"""Tells whether sources may have changed, without reading them again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from stillhouse.data.data_config import CorpusSource, HubSource, Source
from stillhouse.data.sources import source_files


def sources_fingerprint(sources: Sequence[Source], base: Path) -> list[str]:
    """One line per file: its name, size and modification time; the Python version for a corpus.

    A Hub dataset counts by its name: it is read again only if the recipe changes. Raises DataError
    if files are missing.
    """
    lines = []
    for source in sources:
        if isinstance(source, CorpusSource):
            lines.append(f"{source.name} of Python {platform.python_version()}")
        elif isinstance(source, HubSource):
            local = base / Path(source.dataset).expanduser()
            files = sorted(p for p in local.rglob("*") if p.is_file()) if local.is_dir() else []
            lines += [source.dataset, *map(_stamp, files)]
        else:
            lines += map(_stamp, source_files(source, base))
    return lines


def _stamp(path: Path) -> str:
    facts = path.stat()
    return f"{path.name} {facts.st_size} {facts.st_mtime_ns}"
