"""One file of a run, an export, a checkpoint or a journal is damaged, then used again.

Right: the damage is noticed, or what is read is what was written.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import stillhouse
from bench.input_trials.trial import Trial, notes_so_far
from bench.knock_trials import made_runs
from bench.knock_trials.damage import damaged
from stillhouse.checksums import SUMS, read_sums
from stillhouse.commands import predict
from stillhouse.generation.journal import Journal
from stillhouse.runfolder import MANIFEST, RunFolder, read_manifest
from stillhouse.training import checkpoints
from stillhouse.verify_folder import verify_folder

WHOLE_RUN = 60
"""Of so many trials one runs the whole recipe again, which takes seconds."""
TEXTS = ["cat number 3", "soup number 4"]


@dataclass(frozen=True)
class Place:
    """A file that can be damaged. folder: what is copied before it. file: in the folder."""

    kind: str
    folder: Path
    file: str


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    place = places()[number % len(places())]
    copy = folder / "stages" / place.folder.name if place.kind == "stage" else folder / "copy"
    _link_tree(place.folder, copy)
    name, data = damaged(chance, (place.folder / place.file).read_bytes())
    target = copy / place.file
    target.unlink()
    if chance.random() < 0.05:
        name = "gone"
    else:
        target.write_bytes(data)
    whole = number % WHOLE_RUN == 0 and place.kind in RERUN
    wrong = RERUN[place.kind] if whole else READ[place.kind]
    title = f"{place.kind}: {place.file}: {name}{', whole run' if whole else ''}"
    return Trial(title, lambda: wrong(place, copy), lambda found: found, "may")


@cache
def places() -> list[Place]:
    """Every file, those of rare kinds several times, in a fixed order without long runs."""
    run, killed = made_runs.finished_run(), made_runs.killed_run()
    (partial,) = killed.glob("stages/.train-*.partial")
    kinds = [
        [place for stage in sorted(run.glob("stages/*-*")) for place in _files("stage", stage)],
        [place for name in ("model", "gguf-f16") for place in _files("export", run / name)],
        list(_files("training", partial)) * 2,
        [p for folder in made_runs.journals().values() for p in _files("journal", folder)] * 3,
        list(_files("store", next(run.glob("stages/signals-*/*/settings.json")).parent)),
        list(_files("predict", made_runs.classifier_run() / "model")) * 2,
    ]
    found = [place for kind in kinds for place in kind]
    random.Random(0).shuffle(found)
    return found


def _files(kind: str, folder: Path) -> Iterator[Place]:
    folder = folder.resolve()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield Place(kind, folder, str(file.relative_to(folder)))


def _link_tree(source: Path, target: Path) -> None:
    """The files are hard links: a damaged one is written anew."""
    shutil.copytree(source, target, copy_function=os.link, symlinks=True)


# --- what uses the files, and what is wrong with the result -------------------------------------


def _stage(place: Place, copy: Path) -> str | None:
    recorded = read_manifest(place.folder)
    same = place.file == MANIFEST and _same_json(place, copy)
    found = RunFolder(copy.parents[1]).finished(recorded["stage"], recorded["depends_on"])
    if found is not None and not same:
        return "the run uses it"
    sound = not any(part.problems for part in verify_folder(copy.parents[1]))
    return "verify says that it is sound" if sound and not same else None


def _verified(place: Place, copy: Path) -> str | None:
    """An export or a store that was copied elsewhere."""
    sound = not any(part.problems for part in verify_folder(copy))
    if not sound or _same_json(place, copy):
        return None
    if place.file == SUMS and read_sums(place.folder) == read_sums(copy):
        return None
    return "verify says that it is sound"


def _training(place: Place, copy: Path) -> str | None:
    """What training resumes from: a checkpoint, and the metrics until then."""
    folder = copy / "checkpoints"
    checkpoints.drop_unusable(folder)
    found = checkpoints.latest(folder)
    step = 0 if found is None else found[1].step
    used = found is not None and place.file.startswith(f"checkpoints/{found[0].name}/")
    if used and not _same_json(place, copy):
        return f"checkpoint {step} is used"
    before = checkpoints.Metrics(place.folder / "metrics.jsonl", keep_to_step=step).rows
    after = checkpoints.Metrics(copy / "metrics.jsonl", keep_to_step=step).rows
    return None if before == after else "other metrics"


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
        return "another answer"
    said = notes_so_far()
    noted = "damaged" in said or "lost" in said
    if None in found.values() and not noted:
        return "answers are lost without a note"
    expected = [(1.5, 40)] * made_runs.FAILURES + [(2.0, 50)]
    return None if billed == expected or noted else f"billed: {billed}"


def _predict(place: Place, copy: Path) -> str | None:
    found, sound = list(predict(copy, TEXTS)), list(predict(place.folder, TEXTS))
    return None if found == sound else f"{found[0]}, but was {sound[0]}"


def _run_stage(place: Place, copy: Path) -> str | None:
    """A whole run over the finished run with the damaged file."""
    run = made_runs.finished_run()
    root = copy.parents[1] / "run"
    _link_tree(run, root)
    damaged_stage = root / "stages" / copy.name
    shutil.rmtree(damaged_stage)
    shutil.copytree(copy, damaged_stage)
    return _run_again(root)


def _run_training(place: Place, copy: Path) -> str | None:
    run = made_runs.killed_run()
    root = copy.parent / "run"
    _link_tree(run, root)
    partial = root / "stages" / place.folder.name
    shutil.rmtree(partial)
    shutil.copytree(copy, partial)
    return _run_again(root)


def _run_again(root: Path) -> str | None:
    recipe = made_runs.stored_recipe(made_runs.place() / "stored", folder=str(root))
    stillhouse.run(recipe)
    for name in ("model/model.safetensors", "gguf-f16/tiny-f16.gguf"):
        if (root / name).read_bytes() != (made_runs.finished_run() / name).read_bytes():
            return f"{name} differs from the undisturbed run's"
    problems = [problem for part in verify_folder(root) for problem in part.problems]
    return f"verify after the run: {problems}" if problems else None


def _same_json(place: Place, copy: Path) -> bool:
    """Whether the damage changed nothing that is read: spaces of a JSON file."""
    try:
        sides = [json.loads((side / place.file).read_bytes()) for side in (place.folder, copy)]
    except (OSError, ValueError):
        return False
    return bool(sides[0] == sides[1])


Wrong = Callable[[Place, Path], str | None]
READ: dict[str, Wrong] = {
    "stage": _stage,
    "export": _verified,
    "store": _verified,
    "training": _training,
    "journal": _journal,
    "predict": _predict,
}
RERUN: dict[str, Wrong] = {"stage": _run_stage, "training": _run_training}
