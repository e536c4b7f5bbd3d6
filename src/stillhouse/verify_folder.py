"""Verifies that the files of run folders, checkpoints, stores, exports, and journals are
unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.checksums import SUMS, damaged_files, wrong_in_export
from stillhouse.errors import RunError
from stillhouse.file_locks import try_lock
from stillhouse.generation.answer_requests import being_written
from stillhouse.generation.journal_file import journal_damage
from stillhouse.runfolder import LOCK
from stillhouse.signals.manifest import SETTINGS
from stillhouse.signals.verify import verify as wrong_in_store
from stillhouse.stage_manifest import MANIFEST, read_manifest
from stillhouse.training.checkpoints import CHECKPOINTS, COMPLETE, checkpoints_in, wrong_in
from stillhouse.training.rollouts import ROLLOUTS, read_rollouts, rollouts_in

JOURNAL = "answers.sqlite"


@dataclass(frozen=True)
class Verified:
    """A folder or file that was read completely. problems: empty if it is intact."""

    path: Path
    kind: str
    problems: list[str]


def verify_folder(path: Path) -> Iterator[Verified]:
    """Read every file of a run folder, stage, store, export, checkpoint, or journal.

    In unfinished stages and training folders, checkpoints and rollouts are read.
    path: can also be a link to a stage's product. Changes nothing. Raises RunError if the path is
    none of these.
    """
    if path.is_file() and path.suffix == ".sqlite":
        yield _journal(path)
    elif (path / "stages").is_dir():
        yield from _run_folder(path)
    elif (path / SETTINGS).is_file():
        wrong = [f"{error.where}: {error.what}" for error in wrong_in_store(path)]
        yield Verified(path, "store", wrong)
    elif (path / MANIFEST).is_file():
        yield _stage(path)
    elif (path / SUMS).is_file():
        yield Verified(path, "export", wrong_in_export(path))
    elif (path / CHECKPOINTS).is_dir():
        yield from _training(path)
    elif (path / COMPLETE).is_file():
        yield Verified(path, "checkpoint", wrong_in(path))
    else:
        yield _part_of_stage(path)


def _run_folder(path: Path) -> Iterator[Verified]:
    for stage in sorted((path / "stages").iterdir()):
        if stage.is_dir() and not stage.name.startswith("."):
            yield _stage(stage)
        elif not stage.name.startswith("."):
            yield Verified(stage, "stage", ["it is not a folder"])
    if not _is_running(path):  # checkpoints come and go
        for unfinished in sorted((path / "stages").glob(".*.partial")):
            yield from _training(unfinished)
    for link in sorted(path.rglob("*")):
        if link.is_symlink() and not link.exists():
            yield Verified(link, "link", ["its target is missing: run `stillhouse run` again"])
    journal = path.parent / JOURNAL
    if journal.is_file() and not being_written(journal):
        yield _journal(journal)


def _is_running(path: Path) -> bool:
    try:
        with (path / LOCK).open("rb") as file:
            return not try_lock(file, shared=True)
    except OSError:
        return False


def _training(path: Path) -> Iterator[Verified]:
    """Read what training needs to resume: its checkpoints and rollouts."""
    for folder in sorted({p.parent for n in (CHECKPOINTS, ROLLOUTS) for p in path.rglob(n)}):
        for checkpoint in reversed(checkpoints_in(folder / CHECKPOINTS)):
            yield Verified(checkpoint, "checkpoint", wrong_in(checkpoint))
        for rollouts in rollouts_in(folder):
            problems = [] if read_rollouts(rollouts) is not None else ["they have changed"]
            yield Verified(rollouts, "rollouts", problems)


def _stage(path: Path, below: Path | None = None) -> Verified:
    """Read a stage. below: the part to read; None for all of it."""
    try:
        files = read_manifest(path)["files"]
        if below is not None:
            inside = [name for name in files if (path / name).is_relative_to(below)]
            files = {name: files[name] for name in inside}
        damaged = damaged_files(path, files, reread=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Verified(path, "stage", [f"{MANIFEST}: {error}"])
    problems = [f"{name} is missing or has changed" for name in damaged]
    return Verified(below or path, "stage", problems)


def _journal(path: Path) -> Verified:
    problem = journal_damage(path)
    return Verified(path, "journal", [] if problem is None else [problem])


def _part_of_stage(path: Path) -> Verified:
    resolved = path.resolve()
    for parent in resolved.parents:
        if (parent / MANIFEST).is_file() and parent.parent.name == "stages":
            return _stage(parent, resolved)
    raise RunError(
        "there is nothing here to verify",
        where=path,
        fix="pass a run folder, a stage, a store, an export with SHA256SUMS, a checkpoint, or a "
        "journal",
    )
