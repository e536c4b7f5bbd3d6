"""Check that a folder given in Python is reused only for the same training.

A stage of a run has a key for everything that it depends on. A folder given by a caller instead
contains a record of this, so that checkpoints of a different training are not resumed from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from stillhouse.atomic_files import write_atomically
from stillhouse.checksums import seal_broken, sealed
from stillhouse.data.batches import Batches
from stillhouse.data.windows import ARRAYS
from stillhouse.errors import TrainingError
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.checkpoints import CHECKPOINTS, checkpoints_in
from stillhouse.training.own_prompts import OwnPrompts
from stillhouse.training.train_config import TrainRecipe, training_key

RECORD = "training.json"
ROWS, NUMBERS = 256, 4096
"""Number of rows of the text, and of values in each of the teacher's tensors, that are compared."""


def require_same_training(
    folder: Path,
    teacher: Teacher | None,
    batches: Batches,
    objective: ObjectiveRecipe,
    settings: TrainRecipe,
    seed: int,
    prompts: OwnPrompts | None = None,
) -> None:
    """Record what the training in this folder depends on, or compare it with the record.

    The student is not compared, since an interrupted training has changed it, and a checkpoint of a
    different architecture does not load.
    Raises TrainingError if the folder's checkpoints are from a different training.
    """
    own = {
        "objective": objective.model_dump(mode="json"),
        **training_key(settings),
        "seed": seed,
        "data": [len(batches), batches.context, batches.supervised_tokens, _sample(batches)],
        "teacher": _identity(teacher),
        "prompts": None if prompts is None else prompts.fingerprint,
    }
    own = json.loads(json.dumps(own))
    known = _record(folder)
    if known is not None:
        changed = [name for name in own if own[name] != known.get(name)]
        if changed:
            raise TrainingError(
                f"this folder has checkpoints of a training with different values of "
                f"{', '.join(changed)}",
                where=folder,
                fix="use a different folder, or delete this one",
            )
    write_atomically(folder / RECORD, json.dumps(sealed(own), indent=1))


def _record(folder: Path) -> dict[str, Any] | None:
    """The record of the training whose checkpoints are here; None if there are no checkpoints, or
    if the record is damaged (checkpoints have their own hashes)."""
    if not checkpoints_in(folder / CHECKPOINTS):
        return None
    try:
        known: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return None if seal_broken(known) else known
    except (OSError, ValueError, AttributeError):
        return None


def _sample(batches: Batches) -> str:
    rows = (batches[index] for index in range(0, len(batches), max(1, len(batches) // ROWS)))
    parts = (row[name].numpy().tobytes() for row in rows for name in ARRAYS)
    return xxhash.xxh3_128_hexdigest(b"".join(parts))


def _identity(teacher: Teacher | None) -> str | None:
    """A fingerprint of the teacher. For a model in memory, this hashes a sample of its weights."""
    if teacher is None or teacher.fingerprint.strip():
        return None if teacher is None else teacher.fingerprint
    if not isinstance(teacher, LocalTeacher):
        return teacher.described
    model: nn.Module = teacher.model
    parts = (
        f"{name} {list(value.shape)}".encode()
        + value.detach().flatten()[:NUMBERS].float().cpu().numpy().tobytes()
        for name, value in model.named_parameters()
    )
    return xxhash.xxh3_128_hexdigest(b"".join(parts))
