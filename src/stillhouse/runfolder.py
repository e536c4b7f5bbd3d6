"""The run folder: its stages are either complete or absent, and it has one owner at a time.

A stage writes into `stages/.NAME-KEY.partial`. When it is done, its manifest is written, every file
is flushed to disk, and the folder gets its final name `stages/NAME-KEY` by one rename. So a folder
with a final name is complete, whenever the process is killed.

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

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
    """The cost of a stage. `tokens` are those a model processed; `flops` follow
    `stillhouse.account`."""

    seconds: float = 0.0
    tokens: int = 0
    flops: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """The result of a stage's work: its cost, without the seconds, and a summary for the report."""

    tokens: int = 0
    flops: int = 0
    peak_memory_bytes: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    """Set if work was resumed, so that this process's clock covers only part of it."""


@dataclass(frozen=True)
class StagePlan:
    """A stage that is ready to run: `work` fills its folder.

    inputs: everything that the result depends on; `version` is increased when the code changes what
    it writes. together: all processes of torchrun take part. resumable: a partly written folder is
    continued, rather than emptied, but without the files and folders whose names begin with a dot:
    they are temporary, except in `scratch`. scratch: names inside the folder that are deleted
    before it is finished. missing: how many results a finished stage still lacks; it runs again
    while there are any. check: raises StillhouseError if the filled folder lacks its product: the
    stage then remains unfinished, with its scratch files. compared_when_read: patterns of large
    files whose readers compare their hashes; before the stage is used, only their sizes are.
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
    """A finished stage. `digest` is a hash of the content of its files."""

    name: str
    path: Path
    digest: str
    cost: Cost
    summary: dict[str, Any]
    reused: bool


class RunFolder:
    """root: contains the stages. links: contains the links to the products; `root` by default."""

    def __init__(self, root: Path, links: Path | None = None) -> None:
        self.root = root
        self.links = links or root
        self.stages = root / "stages"
        self._lock: IO[str] | None = None
        self._place = -1
        self._finished: set[Path] = set()

    def linked_from(self, links: Path) -> RunFolder:
        """The same folder, whose products are pointed to in `links`."""
        other = RunFolder(self.root, links)
        other._lock, other._place, other._finished = self._lock, self._place, self._finished
        return other

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process, with its temporary files (`scratch`).

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
                    f"another process is working in this run folder ({owner})",
                    where=self.root,
                    fix="wait for it or stop it; or give this run another folder: "
                    "--set folder=runs/OTHER",
                )
            with disk_errors(self.root):  # not buffered: it would be written again on closing
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
        """Raise RunError if the run folder is not the one that this process locked, or if one of
        `folders` or of the finished stages is missing: they were deleted or moved, and libraries
        create the folders that they write to. In a new run folder, `folders` are deleted."""
        if self._lock is None:
            return
        own = is_same(self.root / LOCK, os.fstat(self._lock.fileno()))
        gone = [path for path in (*folders, *self._finished) if not path.is_dir()]
        if not is_same(self.root, os.fstat(self._place)) and not (self.root / LOCK).exists():
            for path in folders:
                shutil.rmtree(path, ignore_errors=True)
        if gone or not own:
            raise RunError(
                "this folder was deleted, moved or replaced while the run was using it",
                where=gone[0] if own else self.root,
                fix="put it back if you moved it, and run the same command again",
            )

    def _set_damage_aside(self) -> bool:
        """Rename the files of finished stages that are damaged, so that the next run notices.
        Returns whether there were any, and all were renamed."""
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
        """The finished stage of the plan, or None. Damage is reported."""
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
            note(f"{path} is damaged ({shown}): the {plan.name} stage is done again")
            return None
        self._finished.add(path)
        return stage

    def stage(self, plan: StagePlan) -> Stage:
        """Return the finished stage, or do its work and finish it. Raises RunError."""
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
                        fix="run the same command again: the stage with this file is done again",
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
            for leftover in plan.scratch:  # last: a kill while the files are hashed costs nothing
                shutil.rmtree(partial / leftover, ignore_errors=True)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            flush(self.stages)
        self._finished.add(final)
        return Stage(plan.name, final, digest, cost, outcome.summary, False)

    def require_own(self, name: str) -> None:
        """Raise RunError if there is a file that the run would write, and did not write: it has
        not finished a stage."""
        if (self.root / name).exists() and not any(self.stages.glob("[!.]*")):
            raise _not_ours(self.root / name)

    def require_free(self, name: str) -> Path:
        """The path of a link to a product. Raises RunError if something else is there."""
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
        f"there is a file or folder of yours where {path.name} of this run is to be",
        where=path,
        fix="move it away, or give the run another folder: --set folder=PATH",
    )


def _drop_temporary(folder: Path, scratch: tuple[str, ...]) -> None:
    """Deletes what a killed process was writing: it would become a part of the stage.

    What is in `scratch` does not, and has such names for good: `.metadata` of a sharded checkpoint.
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
            f"the {name} stage has not written what it should: {error.what}",
            where=error.where or folder,
            fix="the stage is not finished, and its checkpoints are kept: give the same command "
            "again",
        ) from error


def record_again(file: Path) -> None:
    """Records a file in the manifest of its finished stage after it was written again.

    Nothing depends on its content. A file of no stage, or of a damaged one, is left as it is.
    """
    try:
        manifest = read_manifest(file.parent)
        manifest["files"][file.name] = file_facts(file)
        manifest["digest"] = digest_of(manifest["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return
    write_atomically(file.parent / MANIFEST, json.dumps(sealed(manifest), indent=2))


def sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush every file below the folder, then the folders, to disk."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    for path in sorted(paths, key=lambda p: (p.is_dir(), str(p))):
        flush(path)
    flush(folder)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: it never has a part of the new content. Raises RunError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            flush(temporary)
            temporary.replace(path)
        except FileNotFoundError as error:
            if not path.parent.is_dir():
                raise
            # Nothing can be made there, as in /proc.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


# --- where a run's folder is -----------------------------------------------------------------


def run_root(recipe: RunRecipe) -> Path:
    """The path of the recipe's run folder."""
    return Path(recipe.folder or Path("runs") / recipe.name)


def answers_path(recipe: RunRecipe) -> Path:
    """The journal of paid answers, shared by all runs in the same parent folder."""
    return run_root(recipe).parent / "answers.sqlite"
