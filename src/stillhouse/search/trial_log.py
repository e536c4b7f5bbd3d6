"""Journal of a search: results are saved as they are found, so that a killed search can resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.account import CountedFlops
from stillhouse.atomic_files import write_atomically
from stillhouse.checksums import with_hash, without_hash
from stillhouse.progress import note
from stillhouse.shared_work import ALONE, Processes

Find = Callable[[], Any]


@dataclass
class Results:
    """Results so far.

    found: by name.
    flops: by name; not counted for timed work.
    seconds: spent so far.
    """

    found: dict[str, Any] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, others: Results) -> None:
        self.found |= others.found
        self.flops |= others.flops


class Journal:
    """Everything that took time to compute, by name, in a JSON file with a hash.

    path is the main process's file; each of the other processes writes its results to a file next
    to it. If a file is damaged, its results are computed again, with a note. All processes must
    call the same methods in the same order.
    """

    def __init__(self, path: Path, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.path = path if processes.leads else path.with_name(f"{path.name}.{processes.own}")
        self._began = time.monotonic()
        self._own = _read(self.path)
        self._all = Results()
        for file in sorted(path.parent.glob(f"{path.name}*")) if processes.leads else ():
            self._all.add(_read(file))
        self._all = processes.from_main(self._all)

    def __contains__(self, name: str) -> bool:
        return name in self.found

    @property
    def found(self) -> dict[str, Any]:
        return self._all.found

    @property
    def flops(self) -> int:
        return sum(self._all.flops.values())

    @property
    def seconds(self) -> float:
        return self._own.seconds + time.monotonic() - self._began

    def once(self, name: str, find: Find) -> Any:
        """Return the value saved under `name`; if there is none, run `find` in the main process and
        save its result. FLOPs are not counted, so that `find` can measure time."""
        if name not in self.found:
            found = Results({name: find()}) if self.processes.leads else Results()
            self._save(found)
            self._all.add(self.processes.from_main(found))
        return self.found[name]

    def once_together(self, name: str, find: Find) -> Any:
        """Same as `once`, but every process runs `find`, and its FLOPs are counted."""
        if name not in self.found:
            found = _counted(name, find)
            found.flops[name] = sum(self.processes.collect(found.flops[name]))
            self._save(found if self.processes.leads else Results())
            self._all.add(found)
        return self.found[name]

    def divide(
        self, finds: Mapping[str, Find], after: Callable[[], object] = lambda: None
    ) -> list[Any]:
        """Return the values saved under the names; run the missing ones of `finds`, each in one of
        the processes, and save their results.

        after: called after each result, in the process that found it.
        """
        own = Results()
        for name in self.processes.in_turn([name for name in finds if name not in self.found]):
            found = _counted(name, finds[name])
            self._save(found)
            own.add(found)
            self._all.add(found)
            after()
        for each in self.processes.collect(own):
            self._all.add(each)
        return [self.found[name] for name in finds]

    def _save(self, new: Results) -> None:
        if not new.found:
            return
        self._own.add(new)
        now = Results(self._own.found, self._own.flops, self.seconds)
        write_atomically(self.path, with_hash(json.dumps(asdict(now), indent=1).encode()))


def _counted(name: str, find: Find) -> Results:
    with CountedFlops() as work:
        value = find()
    return Results({name: value}, {name: work.flops})


def _read(file: Path) -> Results:
    if not file.is_file():
        return Results()
    try:
        return Results(**json.loads(without_hash(file.read_bytes())))
    except (OSError, ValueError, TypeError) as error:
        note(f"{file} is damaged ({error}): its results will be computed again")
        return Results()
