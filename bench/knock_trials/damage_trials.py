"""Trials that damage one file of a run, an export, a checkpoint, or a journal, and then use it.

Right: the damage is detected, or the original data is read.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from bench.input_trials.trial import Trial
from bench.knock_trials import made_runs
from bench.knock_trials.damage import damaged
from bench.knock_trials.damage_uses import READ, RERUN, Place
from stillhouse import checksums
from stillhouse.evaluation.results import EVALUATION
from stillhouse.pipeline.run_progress import PROGRESS
from stillhouse.stage_manifest import MANIFEST
from stillhouse.training.checkpoints import METRICS

WATCHED = ("recipe.yaml", PROGRESS, MANIFEST, METRICS, EVALUATION)
"""Names of the files that a run's live page reads."""
WHOLE_RUN = 40
"""One of this many trials runs the whole recipe again, which takes seconds."""


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    place = places()[number % len(places())]
    copy = folder / "stages" / place.folder.name if place.kind == "stage" else folder / "copy"
    shutil.copytree(place.folder, copy, symlinks=True)
    name = _damage(chance, place, copy)
    whole = number % WHOLE_RUN == 0 and place.kind in RERUN
    wrong = RERUN[place.kind] if whole else READ[place.kind]
    title = f"{place.kind}: {place.file}: {name}{', whole run' if whole else ''}"
    checksums._intact.clear()  # as in a new process
    return Trial(title, lambda: wrong(place, copy), lambda found: found, "may")


def _damage(chance: random.Random, place: Place, copy: Path) -> str:
    """Damage the file in the copy; return what was done."""
    target, before = copy / place.file, (place.folder / place.file).read_bytes()
    others = [path for path in sorted(copy.rglob("*")) if path.is_file() and path != target]
    if place.kind == "journal":  # its lock file holds the count that detects a lost log
        others = []
    alike = [path for path in others if path.stat().st_size == len(before)]
    kind = chance.random()
    if kind < 0.05:
        target.unlink()
        return "gone"
    if kind < 0.12 and others:
        other = chance.choice(alike or others)
        after = other.read_bytes()
        if after != before:
            other.write_bytes(before)
            target.write_bytes(after)
            return f"exchanged with {other.name}"
    name, data = damaged(chance, before)
    time = target.stat().st_mtime_ns
    target.write_bytes(data)
    if chance.random() < 0.5:  # a failing disk does not update the modification time
        os.utime(target, ns=(time, time))
    return name


@cache
def places() -> list[Place]:
    """Return all files in a fixed order that mixes the kinds; rare kinds occur several times."""
    run, killed = made_runs.finished_run(), made_runs.killed_run()
    store = next(run.glob("stages/signals-*/*/settings.json")).parent
    (partial,) = killed.glob("stages/.train-*.partial")
    exports = [run / "model", run / "gguf-f16", made_runs.quantized_run() / "model"]
    kinds = [
        [place for stage in sorted(run.glob("stages/*-*")) for place in _files("stage", stage)],
        [place for export in exports for place in _files("export", export)],
        [place for export in exports for place in _files("teacher", export)],
        list(_files("training", partial)) * 2,
        [p for folder in made_runs.journals().values() for p in _files("journal", folder)] * 3,
        list(_files("store", store)),
        list(_files("stored teacher", store)),
        list(_files("unfinished store", store)),
        list(_files("predict", made_runs.classifier_run() / "model")) * 2,
        list(_files("report", next(run.glob("stages/report-*")))) * 3,
        list(_files("windows", made_runs.windows())),
        list(_files("left", made_runs.left())) * 4,
        list(_files("converted", made_runs.converted())),
        list(_files("roots", made_runs.cached_maps())) * 3,
        list(_files("rollouts", made_runs.rollouts())) * 2,
        [place for place in _files("watched", run) if Path(place.file).name in WATCHED] * 2,
    ]
    found = [place for kind in kinds for place in kind]
    random.Random(0).shuffle(found)
    return found


def _files(kind: str, folder: Path) -> Iterator[Place]:
    folder = folder.resolve()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield Place(kind, folder, str(file.relative_to(folder)))
