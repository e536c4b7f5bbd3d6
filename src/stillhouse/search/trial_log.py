"""The results of a search so far, saved after every step, so that a killed search resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse.account import count_flops
from stillhouse.checksums import with_hash, without_hash
from stillhouse.progress import note
from stillhouse.runfolder import write_atomically


class Journal:
    """One file: a name and a value for everything that took time to compute; JSON with a hash.

    If the file is damaged, the search starts again, with a note. seconds, flops: spent in all
    processes up to their last entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self.flops = 0
        self._earlier = 0.0
        self._began = time.monotonic()
        if path.is_file():
            try:
                before = json.loads(without_hash(path.read_bytes()))
            except (OSError, ValueError) as error:
                note(f"{path} is damaged ({error}): the search starts again")
                return
            self.found = before["found"]
            self._earlier, self.flops = before["seconds"], before["flops"]

    def __contains__(self, name: str) -> bool:
        return name in self.found

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """The value saved under `name`, or the result of `find`, which is saved first."""
        if name not in self.found:
            self.found[name] = find()
            now = {"found": self.found, "seconds": self.seconds, "flops": self.flops}
            write_atomically(self.path, with_hash(json.dumps(now, indent=1).encode()))
        return self.found[name]

    def once_counted(self, name: str, find: Callable[[], Any]) -> Any:
        """As `once`, but the FLOPs of `find` are counted: do not use it for timed code."""

        def counted() -> Any:
            with count_flops() as work:
                value = find()
            self.flops += work.flops
            return value

        return self.once(name, counted)
