"""Trainer checkpoints that are either complete or absent, and the metrics that belong to them.

transformers writes a checkpoint file by file under its final name. If it is killed in between, the
checkpoint looks complete, so a checkpoint is valid only if it contains `complete.json`, which is
written last.
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

from stillhouse.atomic_files import flush_tree, write_atomically
from stillhouse.checksums import damaged_files, fast_facts, seal_broken, sealed
from stillhouse.errors import TrainingError
from stillhouse.progress import note

COMPLETE = "complete.json"
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
"""The names of a training run's folder of checkpoints and file of metrics."""
_NAME = re.compile("checkpoint-[0-9]+")


@dataclass(frozen=True)
class Meter:
    """Training progress at a checkpoint: steps, supervised tokens, and seconds of work.

    own_tokens: supervised tokens that the student generated. processed_tokens: tokens that the
    student read and generated for its rollouts.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    own_tokens: int = 0
    processed_tokens: int = 0


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first. Copies such as `checkpoint-8.old` are ignored."""
    found = (path for path in folder.glob("checkpoint-*") if path.is_dir())
    named = [path for path in found if _NAME.fullmatch(path.name)]
    return sorted(named, key=step_of, reverse=True)


def seal(checkpoint: Path, meter: Meter, metrics: Metrics | None = None) -> None:
    """Flush the checkpoint to disk and mark it complete. All processes must have written it before.

    metrics: the metrics so far, a copy of which becomes part of the checkpoint.
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
    """The newest checkpoint that is complete and unchanged; None if there is none."""
    for checkpoint in checkpoints_in(folder):
        facts = _facts(checkpoint)
        if facts is not None and not damaged_files(checkpoint, facts["files"]):
            return checkpoint, Meter(**facts["meter"])
    return None


def wrong_in(checkpoint: Path) -> list[str]:
    """List changes to a checkpoint since it was complete; empty for an incomplete checkpoint, which
    is not used."""
    if not (checkpoint / COMPLETE).exists():
        return []
    facts = _facts(checkpoint)
    if facts is None:
        return [f"{COMPLETE} has changed"]
    damaged = damaged_files(checkpoint, facts["files"], reread=True)
    return [f"{name} is missing or has changed" for name in damaged]


def drop_unusable(folder: Path) -> None:
    """Delete checkpoints that were only partly written, and rename damaged ones."""
    for checkpoint in checkpoints_in(folder):
        facts = _facts(checkpoint)
        damaged = [] if facts is None else damaged_files(checkpoint, facts["files"])
        if facts is None:
            note(f"ignoring {checkpoint.name}, which was only partly written")
            shutil.rmtree(checkpoint)
        elif damaged:
            set_aside(checkpoint, f"{damaged[0]} is damaged")


def set_aside(checkpoint: Path, why: str) -> None:
    """Rename a checkpoint that cannot be loaded, so that it is neither loaded nor overwritten."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    before = latest(checkpoint.parent)
    instead = "training starts over" if before is None else f"going back to {before[0].name}"
    note(f"{checkpoint.name} cannot be loaded ({why}); renamed it to {aside.name}: {instead}")


def keep_newest(folder: Path, count: int) -> None:
    for checkpoint in checkpoints_in(folder)[count:]:
        shutil.rmtree(checkpoint)


def oldest_step(folder: Path) -> int:
    """The step of the oldest checkpoint; 0 if there is none."""
    return min(map(step_of, checkpoints_in(folder)), default=0)


def _facts(checkpoint: Path) -> dict[str, Any] | None:
    """The content of COMPLETE: the meter, and files with their sizes and hashes. None if it is not
    valid, since the checkpoint is then incomplete."""
    try:
        facts = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        Meter(**facts["meter"]), facts["files"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return None if seal_broken(facts) else facts


class Metrics:
    """Logged metrics: one row per line of metrics.jsonl, each with its optimizer step."""

    def __init__(self, path: Path | None = None, *, keep_to_step: int = 0) -> None:
        """Start with the rows of a checkpoint, and discard rows that a killed process wrote later.

        path: None keeps the rows only in memory. keep_to_step: the step of the checkpoint to resume
        from, in the folder `checkpoints` next to the file; 0 to start from the beginning.
        """
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
    """Raise TrainingError if a logged loss or gradient norm is not finite, since no checkpoint must
    be written after that."""
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
    """Read the rows of a metrics.jsonl, up to the first line that is truncated or damaged."""
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
