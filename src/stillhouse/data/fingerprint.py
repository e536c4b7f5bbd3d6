"""Whether sources may have changed since they were read, without reading them again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from stillhouse.data.data_config import CorpusSource, HubSource, Source
from stillhouse.data.sources import source_files


def sources_fingerprint(sources: Sequence[Source], base: Path) -> list[str]:
    """One line a file: its name, size and time of change; the Python version for a corpus.

    A data set of the Hub is named, not asked: it is read again only where the recipe changes.
    Raises DataError where files are missing.
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
