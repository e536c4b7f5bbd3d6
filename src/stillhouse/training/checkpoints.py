"""Trainer checkpoints that are complete or absent, and the metrics that belong to them.

transformers writes a checkpoint file by file under its final name. A kill in the middle leaves one
that looks complete, so a checkpoint is valid only once it contains `complete.json`, written last.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.checksums import damaged_files, fast_facts, seal_broken, sealed
from stillhouse.errors import TrainingError
from stillhouse.progress import note
from stillhouse.runfolder import flush_tree, write_atomically

COMPLETE = "complete.json"
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
"""The folder of a training that has them."""
_NAME = re.compile("checkpoint-[0-9]+")


@dataclass(frozen=True)
class Meter:
    """Training progress at a checkpoint: steps, supervised tokens, and seconds of work.

    own_tokens: those of the supervised tokens that the student wrote. processed_tokens: read and
    written by the student for its rollouts.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    own_tokens: int = 0
    processed_tokens: int = 0


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """The newest first. A copy that a user made, `checkpoint-8.old`, is none of them."""
    found = (path for path in folder.glob("checkpoint-*") if path.is_dir())
    named = [path for path in found if _NAME.fullmatch(path.name)]
    return sorted(named, key=step_of, reverse=True)


def seal(checkpoint: Path, meter: Meter, metrics: Metrics | None = None) -> None:
    """Flush the checkpoint to disk and mark it complete. All processes must have written it.

    metrics: the metrics so far; a copy becomes part of the checkpoint.
    """
    if metrics is not None and metrics.path is not None:
        (checkpoint / metrics.path.name).write_text(_lines(metrics.rows), encoding="utf-8")
    flush_tree(checkpoint)
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    files = {path.relative_to(checkpoint).as_posix(): fast_facts(path) for path in paths}
    facts = sealed({"meter": asdict(meter), "files": files})
    write_atomically(checkpoint / COMPLETE, json.dumps(facts))
    flush_tree(checkpoint)


def latest(folder: Path) -> tuple[Path, Meter] | None:
    """The newest checkpoint that is complete and unchanged."""
    for checkpoint in checkpoints_in(folder):
        facts = _facts(checkpoint)
        if facts is not None and not damaged_files(checkpoint, facts["files"]):
            return checkpoint, Meter(**facts["meter"])
    return None


def wrong_in(checkpoint: Path) -> list[str]:
    """What has changed in a checkpoint since it was complete; nothing in one that was cut off,
    which is not used."""
    if not (checkpoint / COMPLETE).exists():
        return []
    facts = _facts(checkpoint)
    if facts is None:
        return [f"{COMPLETE} has changed"]
    damaged = damaged_files(checkpoint, facts["files"], reread=True)
    return [f"{name} is missing or has changed" for name in damaged]


def drop_unusable(folder: Path) -> None:
    """Delete checkpoints that were only partly written, and set damaged ones aside."""
    for checkpoint in checkpoints_in(folder):
        facts = _facts(checkpoint)
        damaged = [] if facts is None else damaged_files(checkpoint, facts["files"])
        if facts is None:
            note(f"{checkpoint.name} was cut off while it was written: ignored")
            shutil.rmtree(checkpoint)
        elif damaged:
            set_aside(checkpoint, f"{damaged[0]} is damaged")


def set_aside(checkpoint: Path, why: str) -> None:
    """Rename a checkpoint that cannot be loaded, so that it is neither used nor overwritten."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    before = latest(checkpoint.parent)
    instead = "training starts again" if before is None else f"going back to {before[0].name}"
    note(f"{checkpoint.name} cannot be loaded ({why}), and is now {aside.name}: {instead}")


def keep_newest(folder: Path, count: int) -> None:
    for checkpoint in checkpoints_in(folder)[count:]:
        shutil.rmtree(checkpoint)


def oldest_step(folder: Path) -> int:
    """The step of the oldest checkpoint; 0 if there is none."""
    return min(map(step_of, checkpoints_in(folder)), default=0)


def _facts(checkpoint: Path) -> dict[str, Any] | None:
    """What the seal recorded: meter, and files with their sizes and hashes. None if there is no
    valid seal: the checkpoint is not complete."""
    try:
        facts = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        Meter(**facts["meter"]), facts["files"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return None if seal_broken(facts) else facts


class Metrics:
    """The rows that training logs, each with its optimizer step; one per line of metrics.jsonl."""

    def __init__(self, path: Path | None = None, *, keep_to_step: int = 0) -> None:
        """path: None keeps them only in memory. keep_to_step: of the checkpoint to resume from in
        the folder `checkpoints` next to the file, 0 to begin. Its rows are kept; what a killed
        process wrote after that is discarded."""
        self.path = path
        self.rows: list[dict[str, float]] = []
        if path is not None:
            copy = path.parent / CHECKPOINTS / f"checkpoint-{keep_to_step}" / path.name
            self.rows = read_metrics(copy)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _lines(self.rows))

    def append(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def check_finite(logs: Mapping[str, float], step: int) -> None:
    """Raise TrainingError if a logged loss or its gradient's norm is not finite: no checkpoint may
    be written after it."""
    if all(math.isfinite(logs.get(name, 0.0)) for name in ("loss", "grad_norm")):
        return
    raise TrainingError(
        f"the loss or its gradient is not finite at step {step} "
        f"(loss {logs['loss']}, gradient norm {logs.get('grad_norm')})",
        where="training",
        fix="lower train.learning_rate, or inspect the data with `stillhouse preview`; "
        "checkpoints before this step are kept",
    )


def _lines(rows: Iterable[Mapping[str, float]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, up to the first line that was cut off by a kill or damaged."""
    rows: list[dict[str, float]] = []
    if not path.exists():
        return rows
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
            break
        rows.append(row)
    return rows
