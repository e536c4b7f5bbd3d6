"""What must hold after a disturbed run: the results of an undisturbed run, and no leftovers."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tests.generation.stub import Stub

from bench.knock_trials.tiny_runs import AT_ONCE, Server, files_of, made_by, undisturbed
from stillhouse.verify_folder import verify_folder


def differences(kind: str, root: Path) -> list[str]:
    """List differences from an undisturbed run's exports, and problems found by `verify`."""
    expected, found = undisturbed(kind).made, made_by(root)
    names = expected.keys() | found.keys()
    differ = sorted(name for name in names if expected.get(name) != found.get(name))
    problems = [problem for part in verify_folder(root) for problem in part.problems]
    problems = [f"verify: {problem}" for problem in problems]
    if differ:
        problems.append(f"{len(differ)} of {len(names)} tensors and files differ: {differ[:3]}")
    return problems


def leftovers(kind: str, root: Path, temporary: Path) -> list[str]:
    """List missing files, and files left in or next to the run folder or in the temporary one."""
    files, expected = files_of(root), undisturbed(kind).files
    for end in ("-wal", "-shm"):  # from a journal that was open when its process was killed
        del files[f"answers.sqlite{end}"]
    problems = [f"left: {name}" for name in [*(files - expected), *listed(temporary)]]
    return problems + [f"missing: {name}" for name in expected - files]


def listed(temporary: Path) -> list[str]:
    """List the folder's content, without the logs that torch leaves when torchrun is killed."""
    names = [str(path.relative_to(temporary)) for path in temporary.rglob("*")]
    return [name for name in names if not name.startswith("torchelastic_")]


class Books:
    """The requests and responses of each process: an oracle for answers bought twice."""

    def __init__(self, server: Server, stub: Stub, journal: Path) -> None:
        self.server, self.stub, self.journal = server, stub, journal
        self.received: list[set[str]] = []

    def next_process(self) -> None:
        """Start counting for the next process. Call this after the previous process has ended."""
        known = {payload["messages"][-1]["content"] for payload in self.stub.read}
        self.received.append(known | committed(self.journal))
        if len(self.received) > 1:
            self.server.asked.append([])

    def forget(self) -> None:
        """Reset the books after the run and its journal were deleted."""
        self.server.asked[:], self.received = [[]], []
        self.stub.read.clear()

    def problems(self) -> list[str]:
        found = []
        before: list[str] = []
        for number, (asked, received) in enumerate(
            zip(self.server.asked, self.received, strict=True)
        ):
            if twice := received.intersection(asked):
                found.append(f"bought twice by process {number}: {sorted(twice)[:3]}")
            if len(set(asked)) < len(asked):
                found.append(f"process {number} asked twice within itself")
            again = len(set(before).intersection(asked))
            if again > AT_ONCE * number:
                found.append(f"process {number} asked {again} times again")
            before += asked
        return found


def committed(journal: Path) -> set[str]:
    """Return the prompts answered in a journal, which no process may be writing."""
    try:
        with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT messages FROM answers").fetchall()
    except sqlite3.OperationalError:
        return set()
    return {json.loads(messages)[-1]["content"] for (messages,) in rows}


def one_message(said: str, words: Sequence[str] = ("error:",)) -> str | None:
    """Check that a process printed exactly one message; return what is wrong, or None."""
    if "Traceback" in said or "this is a bug" in said:
        return f"a traceback: {said[-900:]}"
    count = sum(said.count(word) for word in ("error:", "stopped."))
    if count != 1 or not any(word in said for word in words):
        return f"{count} messages: {said[-600:]}"
    return None
