"""Trials in which the disk fills up or becomes read-only, or the run folder disappears.

Right: one message that names the place. Once there is space again or the folder is back, the same
command produces the tensors of an undisturbed run, repeats no finished stage, and buys no answer
again. If this process is not allowed to mount, a file size limit simulates the full disk.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tests.forks import Fork

from bench.input_trials.trial import Trial
from bench.knock_trials import made_runs, moments
from bench.knock_trials.aftermath import Books, differences, leftovers, one_message
from bench.knock_trials.moments import Moment
from bench.knock_trials.tiny_runs import KINDS, REQUESTS, Kind, patience, served, undisturbed
from stillhouse.generation.request_pool import SPACE

What = Literal["full", "full TMPDIR", "read-only", "deleted", "moved"]
WHATS: tuple[What, ...] = ("full", "full", "full TMPDIR", "full", "moved", "read-only", "deleted")
WORDS = {
    "full": ("disk is full", "almost full", "is larger than"),
    "full TMPDIR": ("TMPDIR",),
    "read-only": ("read-only",),
    # The second phrase occurs before the folder is locked.
    "deleted": ("deleted, moved, or replaced", "may have been deleted or moved"),
    "moved": ("deleted, moved, or replaced", "may have been deleted or moved"),
}
SIZE = 48 << 20
"""Size of an in-memory disk in bytes."""
LIMIT = 1 << 14
"""File size limit in bytes, if mounting is not possible."""
UNKNOWN = "has no record that this recipe wrote it"
"""Part of the message about bought text if the run folder was deleted."""
BOUGHT = ("journal", "synthesis", "answers")
"""Parts of a run in which answers arrive; the space reserved for them stays free."""


@dataclass(frozen=True)
class Disaster:
    """A fault to inject. disk: mounted file system, None if mounting fails. root: run folder."""

    what: What
    disk: Path | None
    root: Path
    room: int = 0

    def strike(self, _moment: Moment) -> None:
        """Inject the fault, in the process of the run."""
        if self.what == "deleted":
            shutil.rmtree(self.root)
        elif self.what == "moved":
            self.root.rename(self.root.with_name("elsewhere"))
        elif self.disk is None:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
        elif self.what == "read-only":
            _mount("--bind", str(self.root), str(self.root))
            _mount("-o", "remount,bind,ro", str(self.root))
        else:
            free = shutil.disk_usage(self.disk).free
            filler = os.open(self.disk / "filler", os.O_WRONLY | os.O_CREAT)
            os.posix_fallocate(filler, 0, max(free - self.room, 1))
            os.close(filler)

    def repair(self) -> None:
        if self.what == "moved":
            shutil.rmtree(self.root, ignore_errors=True)  # files that a library has created again
            self.root.with_name("elsewhere").rename(self.root)
        elif self.disk is not None and self.what == "read-only":
            subprocess.run(["umount", "--lazy", str(self.root)], check=True)
        elif self.disk is not None:
            (self.disk / "filler").unlink(missing_ok=True)


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    """Cycle through the parts of a run, then through the same parts of other kinds of runs."""
    what = WHATS[number % len(WHATS)]
    if what in ("full TMPDIR", "read-only") and not can_mount():
        what = "full"
    pairs = in_turn("scratch" if what == "full TMPDIR" else None)
    name, part = pairs[number % len(pairs)]
    # In the first half of the writes, so that something remains to be written.
    moment = Moment(part, chance.randint(1, (undisturbed(name).writes[part] + 1) // 2))
    title = f"{name}: {what} at {moment.part} {moment.number}"
    return Trial(title, lambda: _problem(KINDS[name], what, moment, folder), lambda found: found)


@cache
def in_turn(only: str | None) -> list[tuple[str, str]]:
    """Return kinds of runs and parts: first each part once, then the others in a fixed order."""
    pairs = [
        (name, part)
        for name, kind in KINDS.items()
        if not kind.fresh
        for part in undisturbed(name).writes
        if part != REQUESTS and only in (None, part)
    ]
    first = {part: (name, part) for name, part in reversed(pairs)}.values()
    others = [pair for pair in pairs if pair not in first]
    random.Random(0).shuffle(others)
    return [*first, *others]


def _problem(kind: Kind, what: What, moment: Moment, folder: Path) -> str | None:
    """Run the trial; return what is wrong, or None."""
    with ExitStack() as stack:
        disk = folder / "disk"
        disk.mkdir()
        mounted = can_mount() and what != "deleted" and what != "moved"
        if mounted:
            stack.enter_context(small_disk(disk))
        place = folder if what == "full TMPDIR" else disk
        root, temporary = place / "runs" / "run", disk / "tmp"
        temporary.mkdir()
        room = SPACE if moment.part in BOUGHT else 0
        disaster = Disaster(what, disk if mounted else None, root, room)
        environment = {"TMPDIR": str(temporary) if what == "full TMPDIR" else ""}
        with served(kind, root) as (recipe, server, stub):
            books = Books(server, stub, root.parent / "answers.sqlite")
            books.next_process()
            process = start(kind, recipe, root, environment, moment, disaster)
            status = process.wait(patience())
            if status != 0 and (wrong := _wrong_end(process, status, what)):
                return wrong
            finished = manifests(root.with_name("elsewhere") if what == "moved" else root)
            disaster.repair()
            books.next_process()
            last = start(kind, recipe, root, environment)
            if last.wait(patience()) != 0 and what == "deleted" and UNKNOWN in last.errors():
                root.with_suffix(".jsonl").unlink()  # as the error says
                books.next_process()
                last = start(kind, recipe, root, environment)
            if last.wait(patience()) != 0:
                return f"the last process: {last.errors()[-900:]}"
        again = finished.items() - manifests(root).items()
        problems = [f"done again: {path}" for path, _ in again]
        problems += differences(kind.name, root) + books.problems()
        problems += leftovers(kind.name, root, temporary)
    return "; ".join(problems) or None


def _wrong_end(process: Fork, status: int, what: What) -> str | None:
    said = process.errors()
    return one_message(said, WORDS[what]) if status == 1 else f"status {status}: {said[-900:]}"


def manifests(root: Path) -> dict[str, int]:
    """Return the manifests of finished stages, which are written last."""
    found = root.glob("stages/[!.]*/manifest.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


# --- processes and disks -------------------------------------------------------------------------


def start(
    kind: Kind,
    recipe: Path,
    root: Path,
    environment: dict[str, str],
    moment: Moment | None = None,
    disaster: Disaster | None = None,
) -> Fork:
    folders = [str(root.parent), *filter(None, environment.values())]
    given = (["run", "--yes", str(recipe)], folders, moment, disaster)
    environment = {"STILLHOUSE_CACHE": str(recipe.parent / "cache"), **environment}
    return Fork(_run, *given, environment=environment)


def _run(
    arguments: list[str], folders: list[str], moment: Moment | None, disaster: Disaster | None
) -> None:
    if disaster is not None:
        moments.watch(tuple(folders), moment, disaster.strike)
    moments.run_in_fork(arguments, folders, None, "")


@cache
def can_mount() -> bool:
    folder = made_runs.place() / "mounted"
    folder.mkdir()
    try:
        with small_disk(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount an in-memory file system. Raises CalledProcessError if that is not allowed."""
    _mount("-t", "tmpfs", "-o", f"size={SIZE}", "knocks", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
