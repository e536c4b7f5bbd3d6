"""Moments at which a signal is sent to a run: before its n-th write to a part of its folders.

Python calls an audit hook before it opens, creates, renames, or deletes a file. So a moment is the
same in every repetition, and can lie between any two changes on the disk.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Victim = Literal["it", "its children", "its group", "its parent", "its sibling", "its family"]

_PATH = {
    "open": 0, "os.mkdir": 0, "os.remove": 0, "os.rename": 1, "os.rmdir": 0, "os.symlink": 1,
    "shutil.rmtree": 0, "sqlite3.connect": 0,
}  # fmt: skip
"""Maps audit events to the index of the argument that is the changed path."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_STAGE = re.compile(r".*/stages/\.?(?P<stage>[a-z_]+)(?:-[a-z0-9_]+)*-[0-9a-f]{12}")
OWN_PROCESS, TIME, IMPORTS = "own process", "start", "start of Python"
"""Pseudo-parts: the start of a replay's process, a time after the start of the run, and the startup
of Python itself."""


@dataclass(frozen=True)
class Moment:
    """The moment before write `number` to `part`, or `delay` seconds later."""

    part: str
    number: int
    delay: float = 0.0
    victim: Victim = "it"
    signal: int = signal.SIGKILL
    noted: str = ""
    """Path of a file that receives the time of the signal, from time.monotonic()."""

    def __str__(self) -> str:
        later = f" + {self.delay * 1000:.0f} ms" if self.delay else ""
        whom = "" if self.victim == "it" else f" to {self.victim}"
        return f"{signal.Signals(self.signal).name}{whom} at {self.part} {self.number}{later}"


def watch(
    folders: tuple[str, ...], moment: Moment | None, act: Callable[[Moment], None] | None = None
) -> Counter[str]:
    """Count the writes to each part of these folders from now on, and act at the moment.

    act: sends the moment's signal by default. Watching cannot be stopped: this is for processes
    that do a single run.
    """
    act = act or _send
    counts: Counter[str] = Counter()
    last = ""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal last
        part = _part(event, arguments, folders, last)
        if part is None:
            return
        last = part
        counts[part] += 1
        if moment is not None and (part, counts[part]) == (moment.part, moment.number):
            act(moment)

    sys.addaudithook(hook)
    if moment is not None and moment.part == TIME:
        _send(moment)
    return counts


def _part(
    event: str, arguments: tuple[Any, ...], folders: tuple[str, ...], last: str
) -> str | None:
    """Return the part of the folders that an event writes to, or None."""
    if event == "subprocess.Popen":
        return OWN_PROCESS if "replay" in str(arguments[1]) else None
    place = _PATH.get(event)
    if place is None or (event == "open" and not (arguments[2] or 0) & _WRITES):
        return None
    path = arguments[place]
    path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    if not path.startswith("/"):  # inside a folder that is being deleted
        return last or None if event in ("os.remove", "os.rmdir") else None
    folder = next((folder for folder in folders if path.startswith(folder)), None)
    if folder is None:
        return None
    stage = _STAGE.match(path)
    if stage is not None:
        return stage["stage"]
    name = path.removeprefix(folder).strip("/").split("/")
    if ".scratch" in name or "stillhouse-" in name[0]:
        return "scratch"
    return "journal" if "sqlite" in name[0] else "folder"


def _send(moment: Moment) -> None:
    if moment.noted:
        Path(moment.noted).write_text(str(time.monotonic() + moment.delay))
    if moment.victim == "it" and not moment.delay:
        os.kill(os.getpid(), moment.signal)
        return
    me, parent = os.getpid(), os.getppid()
    whom = {
        "it": str(me),
        "its children": f"$(pgrep -P {me} -f replay[.]py)",
        "its group": f"-{os.getpgid(0)}",
        "its parent": str(parent),
        "its sibling": f"$(pgrep -P {parent} | grep -v {me})",
        "its family": f"{parent} $(pgrep -P {parent})",
    }[moment.victim]
    command = f"sleep {moment.delay:.3f}; kill -{moment.signal} {whom}"
    # In a new session, so that a signal to the process group does not kill it first.
    line = ["setsid", "sh", "-c", command]
    os.posix_spawnp(line[0], line, dict(os.environ))


# --- processes that are disturbed ----------------------------------------------------------------


def run(arguments: list[str], folders: list[str], moment: Moment | None, counted: str) -> None:
    """Run `python -m stillhouse ARGUMENTS`. counted: file for the number of writes."""
    from stillhouse.cli import main

    counts = watch(tuple(folders), moment)
    sys.argv = ["stillhouse", *arguments]
    try:
        main()
    finally:
        if counted:
            Path(counted).write_text(json.dumps(counts))


def run_in_fork(
    arguments: list[str], folders: list[str], moment: Moment | None, counted: str
) -> None:
    """Like `run`, but in a new process group, without separate processes for replays, and with a
    short measurement of the processor's speed."""
    from tests import replays

    from stillhouse import hardware
    from stillhouse.export import fresh_process

    os.setsid()
    hardware._MATMUL_SECONDS = 0.01
    fresh_process.subprocess = replays.IN_THIS_PROCESS  # type: ignore[assignment, attr-defined]
    run(arguments, folders, moment, counted)


def command(
    arguments: list[str], folders: list[str], moment: Moment | None, counted: str
) -> list[str]:
    """Return the arguments of `python -m` for such a process."""
    fields = None if moment is None else asdict(moment)
    return ["bench.knock_trials.moments", json.dumps([arguments, folders, fields, counted])]


if __name__ == "__main__":
    _arguments, _folders, _moment, _counted = json.loads(sys.argv[1])
    if os.environ.get("RANK", "0") != "0":
        _moment, _counted = None, ""
    run(_arguments, _folders, _moment and Moment(**_moment), _counted)
