"""What a search has found so far, on disk after every step, so that a killed one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse.runfolder import write_atomically


class Journal:
    """One JSON file: a name and a value for everything that took time to find."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """The value written under `name`, or what `find` gives, which is written first."""
        if name not in self.found:
            self.found[name] = find()
            write_atomically(self.path, json.dumps(self.found, indent=1))
        return self.found[name]
