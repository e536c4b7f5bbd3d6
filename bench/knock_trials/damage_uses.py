"""Uses of a damaged file. Each returns what is wrong with the result, or None."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stillhouse
from bench.input_trials.trial import notes_so_far
from bench.knock_trials import made_runs
from stillhouse.checksums import SUMS, read_sums
from stillhouse.classify.label_judgment import finished_chunk
from stillhouse.commands import find_predictor
from stillhouse.data.batches import in_order
from stillhouse.data.data import Data
from stillhouse.data.windows import ARRAYS, open_windows
from stillhouse.errors import RunError
from stillhouse.generation.budget import Spending
from stillhouse.generation.journal import Journal
from stillhouse.report.page import REPORT_DATA, read_report, render
from stillhouse.runfolder import Outcome, RunFolder, StagePlan
from stillhouse.search.trial_log import Journal as TrialLog
from stillhouse.signals.store import open_store
from stillhouse.signals.writer import finish_store
from stillhouse.stage_manifest import MANIFEST, read_manifest
from stillhouse.teachers.hashing import file_sha256
from stillhouse.teachers.model_source import resolve_model
from stillhouse.teachers.record_store import segments_of
from stillhouse.teachers.roots_file import cached_roots
from stillhouse.training import checkpoints
from stillhouse.training.rollouts import read_rollouts
from stillhouse.verify_folder import verify_folder
from stillhouse.watch.live_page import index_page, run_page
from stillhouse.watch.watched_runs import read_run

TEXTS = ["cat number 3", "soup number 4"]


@dataclass(frozen=True)
class Place:
    """A file that can be damaged. folder: copied before the damage. file: path in the folder."""

    kind: str
    folder: Path
    file: str


# --- stages, exports, stores -----------------------------------------------------------------


def _stage(place: Place, copy: Path) -> str | None:
    recorded = read_manifest(place.folder)
    same = place.file == MANIFEST and _same_json(place, copy)
    inputs = recorded["depends_on"]
    plan = StagePlan(recorded["stage"], inputs, lambda out: Outcome(), inputs["version"])
    found = RunFolder(copy.parents[1]).finished(plan)
    sound = not any(part.problems for part in verify_folder(copy.parents[1]))
    if sound and not same:
        return "verify says that it is sound"
    if found is None or same:
        return None
    return _stored_teacher(place, copy, "store") if _is_shard(place) else "the run uses it"


def _is_shard(place: Place) -> bool:
    """Whether the file is a shard, which is compared when read, not when its stage is found."""
    return Path(place.file).match("store/shards/*")


def _verified(place: Place, copy: Path) -> str | None:
    """Verify a copied export or store."""
    sound = not any(part.problems for part in verify_folder(copy))
    if not sound or _same_json(place, copy):
        return None
    if place.file == SUMS and read_sums(place.folder) == read_sums(copy):
        return None
    return "verify says that it is sound"


def _teacher(place: Place, copy: Path) -> str | None:
    """Use an export as the model that a run starts from."""
    files = [file.name for file in copy.glob("*.gguf")]
    source = copy / files[0] if files else copy
    cache = copy.parent / "cache"
    resolve_model(str(_original(place, source)), base=Path(), cache=cache)
    resolve_model(str(source), base=Path(), cache=cache)
    used = [name for name in _names(copy) if name.endswith((".gguf", ".safetensors", ".json"))]
    return _differing(place.folder, copy, files or used)


def _original(place: Place, source: Path) -> Path:
    return place.folder / source.name if source.suffix == ".gguf" else place.folder


def _stored_teacher(place: Place, copy: Path, below: str = "") -> str | None:
    found, sound = _read(copy / below), _sound_read(place.folder / below)
    same = len(found) == len(sound) and all(map(np.array_equal, found, sound))
    return None if same else "different signals"


@cache
def _sound_read(store: Path) -> list[Any]:
    return _read(store)


def _read(folder: Path) -> list[Any]:
    """Read all arrays of all signals for the run's training text."""
    (data,) = made_runs.finished_run().glob("stages/data-*")
    store, found = open_store(folder), []
    for batch in in_order(open_windows(data / "train"), 256):
        signal = store.read(segments_of(batch))
        values = [getattr(signal, part.name) for part in fields(signal)]
        found += [value.numpy() for value in values if isinstance(value, torch.Tensor)]
    return found


def _unfinished_store(place: Place, copy: Path) -> str | None:
    """Finish a store whose writer was killed before the manifest; missing shards are made again."""
    (copy / "manifest.json").unlink(missing_ok=True)
    manifest, sound = finish_store(copy), open_store(place.folder).manifest
    if manifest.settings != sound.settings:
        return "different settings"
    whole = {(shard.crc32, shard.rows) for shard in sound.shards}
    return None if {(s.crc32, s.rows) for s in manifest.shards} <= whole else "different shards"


def _windows(place: Place, copy: Path) -> str | None:
    found, sound = Data.open(copy), Data.open(place.folder)
    for part in ("train", "heldout"):
        for name in ARRAYS:
            arrays = [getattr(getattr(one, part), f"{name}_RL") for one in (found, sound)]
            if not np.array_equal(*arrays):
                return f"different {name}"
    return None


def _report(place: Place, copy: Path) -> str | None:
    """Render the report's page, which depends only on its data."""
    pages = [render(read_report(folder / REPORT_DATA)) for folder in (copy, place.folder)]
    return None if pages[0] == pages[1] else "different report"


def _predict(place: Place, copy: Path) -> str | None:
    found, sound = (list(find_predictor(each)(TEXTS)) for each in (copy, place.folder))
    return None if found == sound else f"{found[0]}, but was {sound[0]}"


def _converted(place: Place, copy: Path) -> str | None:
    """Use a cache with a converted GGUF model and its hashes."""
    gguf, sound = made_runs.gguf(), place.folder
    found = resolve_model(str(gguf), base=Path(), cache=copy)
    expected = resolve_model(str(gguf), base=Path(), cache=sound)
    if found.fingerprint != expected.fingerprint:
        return "different fingerprint"
    names = [name for name in _names(expected.path) if name != SUMS]
    wrong = _differing(expected.path, found.path, names)
    if wrong is None and file_sha256(gguf, copy) != file_sha256(gguf, sound):
        return "different hash"
    return wrong


# --- unfinished stages, and answers ------------------------------------------------------------


def _training(place: Place, copy: Path) -> str | None:
    """Load what training resumes from: a checkpoint and the metrics up to it."""
    folder = copy / "checkpoints"
    checkpoints.drop_unusable(folder)
    found = checkpoints.latest(folder)
    step = 0 if found is None else found[1].step
    used = found is not None and place.file.startswith(f"checkpoints/{found[0].name}/")
    if used and not _same_json(place, copy):
        return f"checkpoint {step} is used"
    before = checkpoints.Metrics(place.folder / "metrics.jsonl", keep_to_step=step).rows
    after = checkpoints.Metrics(copy / "metrics.jsonl", keep_to_step=step).rows
    return None if before == after else "different metrics"


def _left(place: Place, copy: Path) -> str | None:
    sound = finished_chunk(place.folder / "scores", 64, 3)
    scores = finished_chunk(copy / "scores", 64, 3)
    if scores is not None and not torch.equal(scores, sound):  # type: ignore[arg-type]
        return "different scores"
    found, known = (TrialLog(side / "journal") for side in (copy, place.folder))
    same = (found.found, found.flops) == (known.found, known.flops)
    return None if same or not found.found else "different measurements"


def _journal(place: Place, copy: Path) -> str | None:
    with Journal(copy / "answers.sqlite") as journal:
        found = {n: journal.get(made_runs.request(n).key) for n in range(made_runs.ANSWERS)}
        billed = [
            journal.billed_failures(made_runs.request(n).key)
            for n in (*range(100, 100 + made_runs.FAILURES), 200)
        ]
    with Journal(made_runs.place() / "journal-closed" / "answers.sqlite") as journal:
        sound = {n: journal.get(made_runs.request(n).key) for n in found}
    if any(answer not in (sound[n], None) for n, answer in found.items()):
        return "different answer"
    said = notes_so_far()
    lost = "damaged" in said or "lost" in said
    if None in found.values() and not lost:
        return "answers are lost without a note"
    expected = [Spending(40, 1.5)] * made_runs.FAILURES + [Spending(50, 2.0)]
    if any(one not in (right, Spending()) for one, right in zip(billed, expected, strict=True)):
        return f"billed: {billed}"
    return None if billed == expected or lost else "failed requests are lost without a note"


def _roots(place: Place, copy: Path) -> str | None:
    """Use a cache with the roots of two tokenizers."""
    sides = [cached_roots(made_runs.aligner(), cache) for cache in (copy, place.folder)]
    maps = [(roots.student_V.tolist(), roots.teacher_W.tolist(), roots.merges) for roots in sides]
    return None if maps[0] == maps[1] else "different roots"


def _rollouts(place: Place, copy: Path) -> str | None:
    found = read_rollouts(copy, made_runs.IDENTITY)
    return None if found in (None, read_rollouts(place.folder)) else "different text"


def _watched(place: Place, copy: Path) -> str | None:
    """Render a run's live page, which leaves out what cannot be read."""
    run_page(read_run("run", copy), "token", 1)
    index_page(copy.parent)
    return None


# --- the whole run again -------------------------------------------------------------------------


def _run_stage(place: Place, copy: Path) -> str | None:
    """Run the whole recipe again over the finished run with the damaged file."""
    root = copy.parents[1] / "run"
    try:
        return _run_again(root, made_runs.finished_run(), copy)
    except RunError:
        if not _is_shard(place):
            raise
        return _same_run(root)  # rerun the same command, as the error says


def _run_training(place: Place, copy: Path) -> str | None:
    root = copy.parent / "run"
    copy = copy.rename(copy.with_name(place.folder.name))
    return _run_again(root, made_runs.killed_run(), copy)


def _run_again(root: Path, before: Path, damaged: Path) -> str | None:
    """Run the recipe again, with the damaged stage in place of the original."""
    shutil.copytree(before, root, symlinks=True)
    shutil.rmtree(root / "stages" / damaged.name)
    shutil.copytree(damaged, root / "stages" / damaged.name)
    return _same_run(root)


def _same_run(root: Path) -> str | None:
    recipe = made_runs.stored_recipe(made_runs.place() / "stored", folder=str(root))
    result = stillhouse.run(recipe)
    assert result is not None
    names = ["model/model.safetensors", "gguf-f16/tiny-f16.gguf"]
    wrong = _differing(made_runs.finished_run(), root, names)
    if wrong is not None:
        return wrong
    # A stage that this run did not use remains damaged.
    used = [part for stage in result.stages for part in verify_folder(stage.path)]
    problems = [problem for part in used for problem in part.problems]
    return f"verify after the run: {problems}" if problems else None


def _names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def _differing(sound: Path, found: Path, names: list[str]) -> str | None:
    for name in names:
        if (sound / name).read_bytes() != (found / name).read_bytes():
            return f"{name} differs"
    return None


def _same_json(place: Place, copy: Path) -> bool:
    """Whether the damage changed only insignificant parts of a JSON file, such as spaces."""
    try:
        sides = [json.loads((side / place.file).read_bytes()) for side in (place.folder, copy)]
    except (OSError, ValueError):
        return False
    return bool(sides[0] == sides[1])


Wrong = Callable[[Place, Path], str | None]
READ: dict[str, Wrong] = {
    "stage": _stage,
    "export": _verified,
    "teacher": _teacher,
    "store": _verified,
    "stored teacher": _stored_teacher,
    "unfinished store": _unfinished_store,
    "training": _training,
    "left": _left,
    "journal": _journal,
    "predict": _predict,
    "report": _report,
    "windows": _windows,
    "converted": _converted,
    "roots": _roots,
    "rollouts": _rollouts,
    "watched": _watched,
}
RERUN: dict[str, Wrong] = {"stage": _run_stage, "training": _run_training}
