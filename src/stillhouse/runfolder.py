"""The run folder: every stage is either complete or absent, and one process at a time owns it.

A stage writes into `stages/.NAME-KEY.partial`. Once its work is done, its manifest is written,
every file is flushed to disk, and a single rename gives the folder its final name,
`stages/NAME-KEY`. So a folder with a final name is complete, no matter when the process is killed.

KEY is a hash of everything the stage depends on: its part of the recipe and the *content* of its
inputs. If a recipe is changed and changed back, its old stages are found again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from stillhouse.atomic_files import flush, flush_tree, write_atomically
from stillhouse.checksums import damaged_files, file_facts, sealed
from stillhouse.disk_errors import disk_errors, made_folder
from stillhouse.errors import RunError, StillhouseError, StoreError
from stillhouse.file_locks import is_same, try_lock
from stillhouse.progress import note
from stillhouse.run_recipe import RunRecipe
from stillhouse.scratch import scratch_in
from stillhouse.stage_manifest import MANIFEST, digest_of, facts_of_files, read_manifest, versions

LOCK = ".lock"


@dataclass(frozen=True)
class Cost:
    """A stage's cost. tokens: the tokens that a model processed. flops: counted as in
    `stillhouse.account`."""

    seconds: float = 0.0
    tokens: int = 0
    flops: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """The result of a stage's work: its cost and a summary for the report."""

    tokens: int = 0
    flops: int = 0
    peak_memory_bytes: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    """Set if the work was resumed, because this process's clock covers only part of it."""


@dataclass(frozen=True)
class StagePlan:
    """A stage that is ready to run.

    inputs: everything that the result depends on. work: fills the stage's folder. version:
    increased when the code changes what it writes. resumable: whether to continue a partly written
    folder rather than empty it; files and folders whose names start with a dot are temporary and
    deleted anyway, except in `scratch`. together: whether all processes of a torchrun take part.
    scratch: names inside the folder to delete before the stage is finished. missing: returns how
    many results a finished stage still lacks; the stage runs again while any are missing. check:
    raises StillhouseError if the filled folder lacks its product; the stage then remains
    unfinished, with its scratch files. compared_when_read: patterns of large files whose readers
    compare their hashes; before the stage is used, only their sizes are compared.
    """

    name: str
    inputs: Mapping[str, Any]
    work: Callable[[Path], Outcome]
    version: int = 1
    resumable: bool = False
    together: bool = False
    scratch: tuple[str, ...] = ()
    missing: Callable[[Stage], int] | None = None
    check: Callable[[Path], None] | None = None
    compared_when_read: tuple[str, ...] = ()

    @property
    def depends_on(self) -> dict[str, Any]:
        return {**self.inputs, "version": self.version}

    @property
    def key(self) -> str:
        canonical = json.dumps({"stage": self.name, **self.depends_on}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """The name of the finished stage's folder."""
        return f"{self.name}-{self.key}"


@dataclass(frozen=True)
class Stage:
    """A finished stage. digest: a hash of its files' contents."""

    name: str
    path: Path
    digest: str
    cost: Cost
    summary: dict[str, Any]
    reused: bool


class RunFolder:
    """A run folder. root: contains the stages. links: contains the links to the products; by
    default, `root`."""

    def __init__(self, root: Path) -> None:
        self.root = self.links = root
        self.stages = root / "stages"
        self._lock: IO[str] | None = None
        self._place = -1
        self._finished: set[Path] = set()

    def linked_from(self, links: Path) -> RunFolder:
        """Return the same run folder with links to its products in `links`."""
        other = copy(self)
        other.links = links
        return other

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process and put temporary files there (`scratch`).

        Raises RunError if another process has locked it.
        """
        with disk_errors(self.root):
            made_folder(self.stages)
            lock = (self.root / LOCK).open("a+", encoding="utf-8", errors="replace")
        with lock:
            if not try_lock(lock):
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                raise RunError(
                    f"another process is using this run folder ({owner})",
                    where=self.root,
                    fix="wait for it, stop it, or use a different folder for this run: "
                    "--set folder=runs/OTHER",
                )
            with disk_errors(self.root):  # unbuffered, or closing would write it again
                lock.truncate(0)
                os.write(lock.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
                self._place = os.open(self.root, os.O_RDONLY)  # keeps its inode number
            self._lock = lock
            try:
                with disk_errors(self.root), scratch_in(self.root):
                    yield
            except Exception:
                self._require_there()
                raise
            finally:
                os.close(self._place)
                self._lock = None

    def _require_there(self, *folders: Path) -> None:
        """Raise RunError if the run folder is not the one that this process locked, or if any of
        `folders` or the finished stages is missing.

        They may have been deleted or moved, and libraries recreate folders that they write to. If
        the run folder was recreated that way, `folders` are deleted from it.
        """
        if self._lock is None:
            return
        own = is_same(self.root / LOCK, os.fstat(self._lock.fileno()))
        gone = [path for path in (*folders, *self._finished) if not path.is_dir()]
        if not is_same(self.root, os.fstat(self._place)) and not (self.root / LOCK).exists():
            for path in folders:
                shutil.rmtree(path, ignore_errors=True)
        if gone or not own:
            raise RunError(
                "this folder was deleted, moved, or replaced while the run was using it",
                where=gone[0] if own else self.root,
                fix="move it back if you moved it, and run the same command again",
            )

    def _set_damage_aside(self) -> bool:
        """Rename damaged files in finished stages, so that the next run notices the damage. Return
        whether there were any and all were renamed."""
        found = False
        try:
            for path in self._finished:
                for name in damaged_files(path, read_manifest(path)["files"], reread=True):
                    (path / name).rename(path / f"{name}.damaged")
                    found = True
        except (OSError, ValueError):
            return False
        return found

    def partial(self, plan: StagePlan) -> Path:
        """The folder that the stage is written to before it is finished."""
        return self.stages / f".{plan.folder}.partial"

    def finished(self, plan: StagePlan) -> Stage | None:
        """Return the plan's finished stage, or None if there is none or it is damaged, which is
        printed."""
        path = self.stages / plan.folder
        self._finished.discard(path)
        if not path.is_dir():
            return None
        try:
            manifest = read_manifest(path)
            cost, summary = Cost(**manifest["cost"]), manifest["summary"]
            stage = Stage(plan.name, path, manifest["digest"], cost, summary, True)
            damaged = damaged_files(path, manifest["files"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            damaged = [f"{MANIFEST} ({error})"]
        if damaged:
            shown = ", ".join(damaged[:3])
            note(f"{path} is damaged ({shown}): rerunning the {plan.name} stage")
            return None
        self._finished.add(path)
        return stage

    def stage(self, plan: StagePlan) -> Stage:
        """Return the finished stage, running and finishing it first if necessary. Raises
        RunError."""
        done = self.finished(plan)
        if done is not None:
            return done
        final, partial = self.stages / plan.folder, self.partial(plan)
        with disk_errors(partial):
            self._require_there()
            if final.is_file():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(final))
            if plan.resumable:
                _drop_temporary(partial, plan.scratch)
            elif partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True, exist_ok=True)
            started = time.time()
            try:
                outcome = plan.work(partial)
            except Exception as error:
                self._require_there(partial)
                if isinstance(error, StoreError) and self._set_damage_aside():
                    raise RunError(
                        error.what,
                        where=error.where,
                        fix="run the same command again to redo the stage with this file",
                    ) from error
                raise
            self._require_there(partial)
            seconds = time.time() - started if outcome.seconds is None else outcome.seconds
            if plan.check is not None:
                _check_product(plan.name, partial, plan.check)
            files = facts_of_files(partial, plan.scratch, plan.compared_when_read)
            cost = Cost(seconds, outcome.tokens, outcome.flops, outcome.peak_memory_bytes)
            digest = digest_of(files)
            manifest = {
                "stage": plan.name,
                "key": plan.key,
                "depends_on": plan.depends_on,
                "digest": digest,
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
                "cost": asdict(cost),
                "summary": outcome.summary,
                "versions": versions(),
                "files": files,
            }
            write_atomically(partial / MANIFEST, json.dumps(sealed(manifest), indent=2))
            flush_tree(partial)
            for leftover in plan.scratch:  # last, so that a kill while hashing loses no work
                shutil.rmtree(partial / leftover, ignore_errors=True)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            flush(self.stages)
        self._finished.add(final)
        return Stage(plan.name, final, digest, cost, outcome.summary, False)

    def require_own(self, name: str) -> None:
        """Raise RunError if a file is in the way that this run would write but cannot have written,
        because it has not finished a stage."""
        if (self.root / name).exists() and not any(self.stages.glob("[!.]*")):
            raise _not_ours(self.root / name)

    def require_free(self, name: str) -> Path:
        """Return the path of the link to a product. Raises RunError if something else is there."""
        link = self.links / name
        if link.exists() and not link.is_symlink():
            raise _not_ours(link)
        return link

    def point(self, name: str, target: Path) -> None:
        """Make `links/name` a relative link to a finished stage's file or folder."""
        link = self.require_free(name)
        with disk_errors(link):
            self.links.mkdir(parents=True, exist_ok=True)
            temporary = self.links / f".{name}.link"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.path.relpath(target, self.links))
            temporary.replace(link)


def _not_ours(path: Path) -> RunError:
    return RunError(
        f"a file or folder that this run did not write is in the way of its {path.name}",
        where=path,
        fix="move it out of the way, or use a different run folder: --set folder=PATH",
    )


def _drop_temporary(folder: Path, scratch: tuple[str, ...]) -> None:
    """Delete what a killed process was writing, which would otherwise become part of the stage.

    Files in `scratch` do not become part of it and can legitimately have such names, such as a
    sharded checkpoint's `.metadata`.
    """
    for path in list(folder.rglob(".*")):
        if path.relative_to(folder).parts[0] in scratch:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_product(name: str, folder: Path, check: Callable[[Path], None]) -> None:
    try:
        check(folder)
    except StillhouseError as error:
        raise RunError(
            f"the {name} stage did not write a usable result: {error.what}",
            where=error.where or folder,
            fix="run the same command again: the stage is unfinished, and its checkpoints are kept",
        ) from error


def record_again(file: Path) -> None:
    """Record a rewritten file in its finished stage's manifest.

    Nothing may depend on the file's content. Does nothing if the file is in no stage, or in a
    damaged one.
    """
    try:
        manifest = read_manifest(file.parent)
        manifest["files"][file.name] = file_facts(file)
        manifest["digest"] = digest_of(manifest["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return
    write_atomically(file.parent / MANIFEST, json.dumps(sealed(manifest), indent=2))


# --- where a run's folder is -----------------------------------------------------------------


def run_root(recipe: RunRecipe) -> Path:
    """The path of the recipe's run folder."""
    return Path(recipe.folder or Path("runs") / recipe.name)


def answers_path(recipe: RunRecipe) -> Path:
    """The path of the journal of paid answers, which all runs in the same parent folder share."""
    return run_root(recipe).parent / "answers.sqlite"
