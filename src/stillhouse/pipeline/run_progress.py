"""The file in a run folder that records which steps are done and how far the current one is.

The main process writes it for `stillhouse watch`. Nothing depends on it: if the disk is full or the
folder is not writable, the run fails elsewhere, with a message.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import psutil
from pydantic import TypeAdapter

from stillhouse.errors import StillhouseError
from stillhouse.progress import Work, observed
from stillhouse.runfolder import RunFolder, Stage

PROGRESS = ".progress.json"
WRITE_SECONDS = 1.0
"""The minimum time between two writes while a step is working."""

StepState = Literal["waiting", "working", "done", "reused", "failed", "stopped"]
RunState = Literal["running", "finished", "failed", "stopped"]


@dataclass
class StepProgress:
    """The progress of one step.

    folder: the stage's folder in `stages`. began: seconds since the epoch. seconds: how long a
    finished step took; for a reused step, how long the original work took.
    """

    name: str
    state: StepState = "waiting"
    folder: str = ""
    began: float = 0.0
    seconds: float = 0.0


@dataclass
class Part:
    """Steps with their own products. folder: the products' folder in the run folder; empty except
    for a family's members."""

    folder: str = ""
    steps: list[StepProgress] = field(default_factory=list)


@dataclass
class RunProgress:
    """The progress of a run.

    base: the folder that relative paths in the recipe refer to. pid, process_began, host: identify
    the main process. work: the current step's progress bar. error: what ended the run.
    """

    base: str
    pid: int = 0
    process_began: float = 0.0
    host: str = ""
    written: float = 0.0
    state: RunState = "running"
    error: str = ""
    parts: list[Part] = field(default_factory=list)
    work: Work | None = None

    def is_running(self) -> bool:
        """Whether the main process is alive; assumed True on a different host, whose processes
        cannot be seen from here."""
        if self.state != "running" or self.host != platform.node():
            return self.state == "running"
        try:
            return abs(psutil.Process(self.pid).create_time() - self.process_began) < 1.0
        except (psutil.Error, ValueError):  # ValueError: a pid that no process can have
            return False


def read_progress(root: Path) -> RunProgress | None:
    """Read a run folder's progress; None if there is no readable file."""
    try:
        return TypeAdapter(RunProgress).validate_json((root / PROGRESS).read_bytes())
    except (OSError, ValueError):
        return None


class ProgressFile:
    """Writes a run's progress. clock: returns seconds since the epoch."""

    def __init__(self, root: Path, base: Path, clock: Callable[[], float] = time.time) -> None:
        process = psutil.Process()
        self.root, self.clock = root, clock
        self.now = RunProgress(
            base=str(base.resolve()),
            pid=process.pid,
            process_began=process.create_time(),
            host=platform.node(),
        )
        self._lock = threading.Lock()
        self.write()

    def expect(self, links: Path, steps: Iterable[str]) -> None:
        """Record a part's steps, in order, before any has started. links: the folder of its
        products."""
        part = self._part(links)
        part.steps = [StepProgress(name) for name in steps]
        self.write()

    def begin(self, links: Path, name: str, folder: str) -> StepProgress:
        """Start the first waiting step with this name. A step that was not expected is inserted
        before the first waiting step."""
        steps = self._part(links).steps
        waiting = [number for number, step in enumerate(steps) if step.state == "waiting"]
        step = next((steps[n] for n in waiting if steps[n].name == name), None)
        if step is None:
            step = StepProgress(name)
            steps.insert(waiting[0] if waiting else len(steps), step)
        step.state, step.folder, step.began = "working", folder, self.clock()
        self.now.work = None
        self.write()
        return step

    def end(self, step: StepProgress, stage: Stage | None, without: StepState = "failed") -> None:
        """Record that a step has ended. stage: None if the step did not finish. without: the step's
        state in that case."""
        step.seconds = self.clock() - step.began
        step.state = without
        if stage is not None:
            step.state = "reused" if stage.reused else "done"
            step.seconds = stage.cost.seconds
        self.now.work = None
        self.write()

    def show(self, work: Work) -> None:
        self.now.work = work
        if self.clock() - self.now.written >= WRITE_SECONDS:
            self.write()

    def close(self, state: RunState, error: str = "") -> None:
        self.now.state, self.now.error, self.now.work = state, error, None
        self.write()

    def write(self) -> None:
        """Write the file without flushing it to disk: after a power failure, the run has ended
        anyway."""
        with self._lock, suppress(OSError):
            self.now.written = self.clock()
            temporary = self.root / f"{PROGRESS}.tmp"
            temporary.write_text(json.dumps(asdict(self.now)), encoding="utf-8")
            os.replace(temporary, self.root / PROGRESS)

    def _part(self, links: Path) -> Part:
        name = "" if links == self.root else links.name
        part = next((part for part in self.now.parts if part.folder == name), None)
        if part is None:
            part = Part(name)
            self.now.parts.append(part)
        return part


_file: ProgressFile | None = None


@contextmanager
def recorded(folder: RunFolder, base: Path) -> Iterator[None]:
    """Record this process's steps in the run folder inside the block."""
    global _file
    _file = file = ProgressFile(folder.root, base)
    try:
        with observed(file.show):
            yield
        file.close("finished")
    except Exception as error:
        what = error.what if isinstance(error, StillhouseError) else type(error).__name__
        file.close("failed", what)
        raise
    except BaseException:  # a signal
        file.close("stopped")
        raise
    finally:
        _file = None


def expect_steps(folder: RunFolder, steps: Iterable[str]) -> None:
    """Record the steps that are going to run, if this process records its steps."""
    if _file is not None:
        _file.expect(folder.links, steps)


@contextmanager
def recorded_step(folder: RunFolder, name: str, stage: str) -> Iterator[list[Stage]]:
    """Record a step; the block appends its finished stage to the yielded list. stage: the name of
    the stage's folder."""
    finished: list[Stage] = []
    if _file is None:
        yield finished
        return
    file, step = _file, _file.begin(folder.links, name, stage)
    without: StepState = "failed"
    try:
        yield finished
    except BaseException as error:
        without = "failed" if isinstance(error, Exception) else "stopped"  # by a signal
        raise
    finally:
        file.end(step, finished[0] if finished else None, without)
