"""A tiny run that is disturbed, resumed with the same command, and then judged."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import psutil

from bench.knock_trials.aftermath import Books, differences, leftovers
from bench.knock_trials.core_waits import CoreWaits
from bench.knock_trials.moments import IMPORTS, Moment
from bench.knock_trials.tiny_runs import REQUESTS, Kind, Process, patience, served, start

WrongEnd = Callable[[Kind, Process, int, Moment, CoreWaits], str | None]
"""Returns what is wrong with the end of a process. Arguments: kind of run, process, exit status,
moment of the fault, and the time without a core."""


@dataclass(frozen=True)
class DisturbedRun:
    """A run with one disturbed process per moment, and a last process that is not disturbed.

    last: how the last process is started. variable: environment variable that names the temporary
    folder. slow: seconds that the server takes to answer the disturbed processes.
    """

    kind: Kind
    last: Kind
    moments: list[Moment]
    folder: Path
    variable: str
    wrong_end: WrongEnd
    slow: float = 0.0

    @cached_property
    def root(self) -> Path:
        return self.folder / "runs" / "run"

    @cached_property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def problem(self) -> str | None:
        """Run all processes; return what is wrong in the end, or None."""
        self.temporary.mkdir()
        environment = {self.variable: str(self.temporary)}
        with served(self.kind, self.root) as (recipe, server, stub):
            books = Books(server, stub, self.root.parent / "answers.sqlite")
            usual, server.delay = server.delay, self.slow or server.delay
            for number, moment in enumerate(self.moments):
                problem = self._disturb(recipe, environment, books, moment, first=number == 0)
                if problem is not None:
                    return f"{moment}: {problem}"
            server.delay, server.at = usual, lambda number: None
            books.next_process()
            process = start(self.last, recipe, self.root, environment)
            status = process.wait(patience())
            if status != 0:
                return f"the last process ended with {status}: {process.errors()[-900:]}"
        problems = differences(self.kind.name, self.root) + books.problems()
        problems += leftovers(self.kind.name, self.root, self.temporary)
        return "; ".join(problems) or None

    def _disturb(
        self,
        recipe: Path,
        environment: dict[str, str],
        books: Books,
        moment: Moment,
        first: bool,
    ) -> str | None:
        """Run one process. The first process is repeated until its moment comes before its end."""
        for _ in range(8):
            books.next_process()
            process = start_for(self.kind, recipe, self.root, environment, moment, books)
            with CoreWaits(process.pid) as waits:
                status = process.wait(patience())
            if status != 0 or not first:
                break
            shutil.rmtree(self.root.parent)
            self.root.parent.mkdir()
            books.forget()
            moment = replace(moment, delay=moment.delay / 2)
        else:
            return "it was over before it was disturbed"
        problem = None
        if status != 0:
            problem = self.wrong_end(self.kind, process, status, moment, waits)
        wait_for_others(recipe)
        return problem


def start_for(
    kind: Kind,
    recipe: Path,
    root: Path,
    environment: dict[str, str],
    moment: Moment,
    books: Books,
) -> Process:
    """Start a process that sends itself the signal, or receives it from here: after a number of
    requests, or during startup."""
    if moment.part not in (REQUESTS, IMPORTS):
        return start(kind, recipe, root, environment, moment)
    started = threading.Event()

    def send() -> None:
        started.wait()
        if process.poll() is None:
            if moment.noted:
                Path(moment.noted).write_text(str(time.monotonic()))
            process.send_signal(moment.signal)

    def at(number: int) -> None:
        if number == moment.number:
            threading.Timer(moment.delay, send).start()

    books.server.at = at
    if moment.part == IMPORTS:
        at(0)
    process = start(kind, recipe, root, environment)
    started.set()
    return process


def wait_for_others(recipe: Path) -> None:
    """Wait until no process runs this recipe: torchrun's processes do not end together."""
    mine = os.getpid()
    others = [
        process
        for process in psutil.process_iter(["pid", "cmdline"])
        if process.pid != mine and str(recipe) in " ".join(process.info["cmdline"] or ())
    ]
    _, alive = psutil.wait_procs(others, timeout=patience())
    assert not alive, f"{alive} have not ended"
