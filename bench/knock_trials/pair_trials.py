"""Trials with two processes at once: in one run folder, on one journal, or on one export.

Right: one of them is rejected or waits, in the end both have the results of an undisturbed run, and
no request is sent twice. The same holds for a command that only reads a run in progress.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from tests import replays, tiny
from tests.export.conftest import ToyWindows
from tests.forks import Fork

from bench.input_trials.trial import Trial
from bench.knock_trials import moments
from bench.knock_trials.aftermath import Books, differences, leftovers, one_message
from bench.knock_trials.tiny_runs import (
    KINDS,
    SERVED,
    Kind,
    Process,
    made_by,
    patience,
    served,
    start,
    undisturbed,
)
from stillhouse.export import fresh_process
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.gate import Gate

LOOKING = ("verify", "report", "check", "evaluate", "preview", "synthesize")
IN_ONE_FOLDER = [name for name, kind in KINDS.items() if not kind.fresh]


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    way = WAYS[number % len(WAYS)]
    names = SERVED if way is _on_one_journal else IN_ONE_FOLDER
    turn, place = divmod(number, len(WAYS))
    kind = KINDS[names[(turn + 2 * place) % len(names)]]
    later = chance.choice([0.0, chance.random() * undisturbed(kind.name).seconds])
    title = f"{kind.name}: {way.__name__.strip('_').replace('_', ' ')}, {later:.2f} s later"
    return Trial(title, lambda: way(kind, folder, later, chance), lambda found: found)


def _in_one_folder(kind: Kind, folder: Path, later: float, chance: random.Random) -> str | None:
    return _two_runs(kind, folder, later, ["run", "run"])


def _on_one_journal(kind: Kind, folder: Path, later: float, chance: random.Random) -> str | None:
    return _two_runs(kind, folder, later, ["run", "other"])


def _two_runs(kind: Kind, folder: Path, later: float, names: list[str]) -> str | None:
    roots = [folder / "runs" / name for name in names]
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary)}
    with served(kind, roots[0]) as (recipe, server, stub):
        books = Books(server, stub, roots[0].parent / "answers.sqlite")
        books.next_process()
        recipes = [recipe, recipe]
        if roots[1] != roots[0]:
            recipes[1] = recipe.with_name("other.yaml")
            recipes[1].write_text(recipe.read_text().replace(str(roots[0]), str(roots[1])))
        first = start(kind, recipes[0], roots[0], environment)
        time.sleep(later)
        second = start(kind, recipes[1], roots[1], environment)
        if problem := _one_was_refused([first, second]):
            return problem
        books.next_process()
        for path, root in dict(zip(recipes, roots, strict=True)).items():
            last = start(kind, path, root, environment)
            if status := last.wait(patience()):
                return f"the last process ended with {status}: {last.errors()[-900:]}"
    problems = books.problems()
    for root in dict.fromkeys(roots):
        problems += differences(kind.name, root)
    if roots[0] == roots[1]:
        problems += leftovers(kind.name, roots[0], temporary)
    return "; ".join(problems) or None


def _one_was_refused(processes: list[Process]) -> str | None:
    """Check that one process was rejected, or that both finished; return what is wrong, or None."""
    statuses = [process.wait(patience()) for process in processes]
    for process, status in zip(processes, statuses, strict=True):
        if status and (problem := one_message(process.errors(), ("another process",))):
            return f"status {status}: {problem}"
    return None if 0 in statuses else f"both ended with {statuses}"


def _looked_at(kind: Kind, folder: Path, later: float, chance: random.Random) -> str | None:
    """Use a command that only reads a run in progress: it may be rejected, but changes nothing."""
    root, temporary = folder / "runs" / "run", folder / "tmp"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary)}
    command = chance.choice(LOOKING)
    with served(kind, root) as (recipe, server, stub):
        books = Books(server, stub, root.parent / "answers.sqlite")
        books.next_process()
        first = start(kind, recipe, root, environment)
        while not (root / "recipe.yaml").exists():
            time.sleep(0.01)
        time.sleep(later)
        what = root if command in ("verify", "report") else recipe
        arguments = [command, str(what)]
        cache = {"STILLHOUSE_CACHE": str(recipe.parent / "cache")}
        second = Fork(moments.run_in_fork, arguments, [], None, "", environment=environment | cache)
        said, status = first, first.wait(patience())
        if status and (problem := one_message(said.errors(), ("another process",))):
            return f"the run ended with {status}: {problem}"
        looked = second.wait(patience())
        if looked and (problem := one_message(second.errors())) and command != "check":
            return f"{command} ended with {looked}: {problem}"
        books.next_process()
        last = start(kind, recipe, root, environment)
        if status := last.wait(patience()):
            return f"the last process ended with {status}: {last.errors()[-900:]}"
    problems = books.problems() + differences(kind.name, root)
    return "; ".join(problems + leftovers(kind.name, root, temporary)) or None


def _in_one_export(kind: Kind, folder: Path, later: float, chance: random.Random) -> str | None:
    """Export the same model to the same folder in both processes."""
    source = tiny.save_model(folder / "source")
    out, alone = (folder / name / "stages" / "export" / "model" for name in ("runs", "alone"))
    cache = {"STILLHOUSE_CACHE": str(folder / "cache")}
    processes: list[Process] = []
    for pause in (0.0, later / 8):
        time.sleep(pause)
        processes.append(Fork(export, source, out, environment=cache))
    statuses = [process.wait(patience()) for process in processes]
    for process, status in zip(processes, statuses, strict=True):
        if status and "stillhouse.errors.RunError: " not in process.errors():
            return f"status {status}: {process.errors()[-900:]}"
    if 0 not in statuses:
        return f"both ended with {statuses}"
    process = Fork(export, source, alone, environment=cache)
    assert process.wait(patience()) == 0, process.errors()
    if made_by(folder / "runs") != made_by(folder / "alone"):
        return "differs from the export of one process"
    left = [path.name for path in out.parent.iterdir() if path != out]
    return f"left: {left}" if left else None


def export(source: Path, out: Path) -> None:
    fresh_process.subprocess = replays.IN_THIS_PROCESS  # type: ignore[assignment, attr-defined]
    gate = Gate(source, ToyWindows(), ["the cat"], seed=0)
    export_checkpoint(gate, out, dtype="bfloat16")


Way = Callable[[Kind, Path, float, random.Random], str | None]
WAYS: list[Way] = [_in_one_folder, _on_one_journal, _looked_at, _in_one_folder, _in_one_export]
