"""Reads run folders while runs write to them, without locking or writing anything.

A file that is missing, half-written, or from a different version is treated as not there yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from stillhouse.evaluation.family_evaluation import FAMILY_FILE
from stillhouse.evaluation.results import EVALUATION
from stillhouse.pipeline.run_progress import (
    PROGRESS,
    Part,
    RunProgress,
    StepProgress,
    read_progress,
)
from stillhouse.progress import Work
from stillhouse.report.history import kl_temperature
from stillhouse.report.page import FAMILY_REPORT, REPORT
from stillhouse.stage_manifest import MANIFEST, read_manifest
from stillhouse.training.checkpoints import METRICS

RECIPE = "recipe.yaml"
FINISHED = ("done", "reused")
_TRAININGS = {
    "train": "Training",
    "baseline": "Training of the fine-tuning baseline",
    "qat": "Quantization-aware training",
    "scratch": "Training from random weights",
}


@dataclass(frozen=True)
class Training:
    """A training. metrics: the file with its metrics. unit: what the loss is averaged over.
    temperature: the temperature of the training KL."""

    title: str
    metrics: Path
    unit: str
    temperature: float


@dataclass(frozen=True)
class WatchedPart:
    """A run, or a family's member. name: the member's name; empty for a run. evaluation, report:
    None until they exist. folders: the finished steps' folders, by step name."""

    name: str
    steps: list[StepProgress]
    trainings: list[Training] = field(default_factory=list)
    evaluation: Path | None = None
    report: str | None = None
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        return sum(step.state in FINISHED for step in self.steps)


@dataclass(frozen=True)
class WatchedRun:
    """A run.

    kind: as `Kind.name`. state: running, finished, failed, stopped, killed, or unknown for a folder
    without recorded progress. evaluation, report: for a family only. changed: when the folder was
    last written to, in seconds since the epoch. base: the folder that the recipe's relative paths
    refer to.
    """

    name: str
    root: Path
    kind: str
    teacher: str
    state: str
    error: str
    changed: float
    parts: list[WatchedPart]
    work: Work | None = None
    evaluation: Path | None = None
    report: str | None = None
    base: Path | None = None

    def part(self, name: str) -> WatchedPart | None:
        return next((part for part in self.parts if part.name == name), None)


def find_runs(folder: Path) -> dict[str, Path]:
    """Find the run folders in a folder, and the folder itself if it is one, by name."""
    found = {}
    with suppress(OSError):
        for path in [folder, *sorted(folder.iterdir())]:
            if (path / "stages").is_dir():
                found[path.resolve().name] = path
    return found


def read_run(name: str, root: Path) -> WatchedRun:
    recipe, progress = _recipe(root), read_progress(root)
    kind = _kind(recipe)
    found = progress or RunProgress(base="", parts=[_without_record(root)])
    run = WatchedRun(
        name=name,
        root=root,
        kind=kind,
        teacher=_teacher(recipe),
        state=_state(root, progress),
        error=found.error,
        changed=_changed(root),
        parts=[_part(root, part, recipe, kind) for part in found.parts],
        work=found.work,
        base=None if progress is None else Path(progress.base),
    )
    if kind == "family":
        report = FAMILY_REPORT if (root / FAMILY_REPORT).is_file() else None
        run = replace(run, evaluation=_if_there(root / FAMILY_FILE), report=report)
    return run if run.state == "running" else replace(run, work=None)


def _part(root: Path, part: Part, recipe: Mapping[str, Any], kind: str) -> WatchedPart:
    unit = "text" if kind == "classify" else "token"
    trainings, folders = [], {}
    for step in part.steps:
        folder = _stage_folder(root, step)
        if folder is None:
            continue
        if step.state in FINISHED:
            folders[step.name] = folder
        metrics = _metrics(folder)
        if metrics is not None:
            title = _TRAININGS.get(step.name, step.name)
            trainings.append(Training(title, metrics, unit, kl_temperature(recipe)))
    evaluation = folders.get("evaluate")
    report = f"{part.folder}/{REPORT}" if part.folder else REPORT
    return WatchedPart(
        name=part.folder,
        steps=part.steps,
        trainings=trainings,
        evaluation=None if evaluation is None else _if_there(evaluation / EVALUATION),
        report=report if (root / report).is_file() else None,
        folders=folders,
    )


def _stage_folder(root: Path, step: StepProgress) -> Path | None:
    """Find the folder of a step that has started, whether finished or still being written."""
    stages = root / "stages"
    places = (stages / step.folder, stages / f".{step.folder}.partial")
    return next((path for path in places if step.folder and path.is_dir()), None)


def _metrics(folder: Path) -> Path | None:
    with suppress(OSError):
        places = [folder / METRICS, *sorted(folder.glob(f"*/{METRICS}"))]
        return next((path for path in places if path.is_file()), None)
    return None


def _without_record(root: Path) -> Part:
    """Reconstruct the steps from stage folders if no progress was recorded, because commands other
    than `run`, such as `signals`, fill stages too. Steps are in starting order, with the last stage
    of each name."""
    steps: dict[str, StepProgress] = {}
    began: list[tuple[str, StepProgress]] = []
    with suppress(OSError):
        for manifest in (root / "stages").glob(f"[!.]*/{MANIFEST}"):
            with suppress(OSError, ValueError, LookupError, TypeError):
                found = read_manifest(manifest.parent)
                seconds = float(found["cost"]["seconds"])
                step = StepProgress(str(found["stage"]), "done", manifest.parent.name, 0.0, seconds)
                began.append((str(found["started"]), step))
    for _, step in sorted(began, key=lambda one: one[0]):
        steps.pop(step.name, None)
        steps[step.name] = step
    return Part("", list(steps.values()))


def _recipe(root: Path) -> Mapping[str, Any]:
    with suppress(OSError):
        facts = (root / RECIPE).stat()
        return _parsed(root / RECIPE, facts.st_mtime_ns, facts.st_size)
    return {}


@lru_cache(maxsize=1024)
def _parsed(recipe: Path, _changed: int, _size: int) -> Mapping[str, Any]:
    """Parse a recipe once per version of its file."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = recipe.get(name)
    return found if isinstance(found, dict) else {}


def _kind(recipe: Mapping[str, Any]) -> str:
    task = _section(recipe, "task").get("kind")
    if task is not None:
        return str(task)
    return "family" if recipe.get("cascade") else "language model"


def _teacher(recipe: Mapping[str, Any]) -> str:
    """The teacher as the recipe names it."""
    section = _section(recipe, "teacher")
    return str(section.get("model") or _section(section, "api").get("model") or "")


def _state(root: Path, progress: RunProgress | None) -> str:
    if progress is None:
        done = (root / REPORT).is_file() or (root / FAMILY_REPORT).is_file()
        return "finished" if done else "unknown"
    return progress.state if progress.state != "running" or progress.is_running() else "killed"


def _changed(root: Path) -> float:
    times = []
    for path in (root / PROGRESS, root / "stages", root / RECIPE):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None
